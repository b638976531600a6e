"""The router's kernel: against the formulas by hand, against the reference in float64, and at the edges."""

from __future__ import annotations

import importlib.util
import itertools
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_fx.kernels.routing import serves
from moe_fx.reference import router as reference
from moe_fx.spec import RouterSpec
from tests.routers.formulas import ROUTERS, E, K, Router
from tests.routers.test_zoo import FUSED

from .here import DEVICE, INTERPRETED, on_device
from .truth import Given, Route, check, check_ids, draw, kernel


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes all the tokens that it can, where a test says nothing else."""
    if INTERPRETED:
        tokens_from(0, monkeypatch)


def tokens_from(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tokens in one program from so many programs on."""
    from moe_fx.kernels.triton import routing

    monkeypatch.setattr(routing, "MANY", programs)


@on_device
@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_is_the_formula_by_hand(router: Router) -> None:
    for given in (
        draw(router.spec, 30, E),
        replace(draw(router.spec, 30, E), logits=draw(router.spec, 30, E).logits - 12),
    ):
        ids, weights = kernel()(given.logits, given.bias, given.scale, router.spec, K)
        empty = [0.0] * E
        for t, row in enumerate(given.logits.tolist()):
            bias, scale = (empty if o is None else o.tolist() for o in (given.bias, given.scale))
            expected_ids, expected = router.by_hand(row, bias, scale, K)
            assert ids[t].tolist() == expected_ids
            assert weights[t].tolist() == pytest.approx(expected, rel=2e-6)


def over_the_range(experts: int) -> Tensor:
    """Logits [200, E] over all that exp has a normal float32 for, and more; a row has many sizes."""
    return torch.linspace(-85, 110, 200 * experts, device=DEVICE).view(experts, 200).t()


@on_device
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("order", ["score_first", "topk_first"])
def test_scores_over_their_range(score: Any, order: Any) -> None:
    """All experts are chosen, so every score is a weight; of neighbours and of logits far apart."""
    logits = over_the_range(32)
    for x in (logits, logits.flatten().view(200, 32), logits / 100):
        check(RouterSpec(score, order), Given(x, None, None), 32)


@on_device
@pytest.mark.parametrize("dtypes", [("float32", ""), ("bfloat16", "float32"), ("float16", "float32")], ids=str)
@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_routers_of_models(router: Router, dtypes: tuple[str, str]) -> None:
    dtype, score_dtype = dtypes
    spec = replace(router.spec, score_dtype=score_dtype)
    assert serves(spec, getattr(torch, dtype), K, E) is None
    check(spec, draw(spec, 50, E, dtype), K, clear=0.7)  # logits of 16 bits tie


@pytest.mark.parametrize("name", [f for families in FUSED.values() for f in families])
@on_device
def test_families_of_transformers(name: str) -> None:
    """Their routers as they are recognised, on more experts than the samples have."""
    samples = pytest.importorskip("tests.zoo.samples")
    from tests.routers.helpers import Fused

    sample = samples.build(name, "grouped_mm" if name == "openai_privacy_filter" else None)
    fused = Fused(sample.model)
    with torch.no_grad():
        fused(**sample.inputs)
    specs = {outcome.router for outcome in fused.outcomes}
    assert specs
    assert None not in specs
    for spec in specs:
        assert serves(spec, torch.float32, 8, 64) is None
        check(spec, draw(spec, 20, 64), 8)


def combinations() -> list[RouterSpec]:
    """Every combination of score, order, bias, groups and renormalisation; what is left is drawn."""
    pick = random.Random(0)
    grouped: list[dict[str, Any]] = [{}]
    for worth, fill, taken in itertools.product(("max", "top2_sum"), (0.0, -math.inf), ("scores", "masked")):
        grouped.append(dict(groups=4, topk_groups=2, group_score=worth, group_fill=fill, weights_from=taken))
    wholes: list[dict[str, Any]] = [
        {}, dict(renormalise=True, eps=1e-20), dict(renormalise=True, eps=1e-3, eps_form="clamp")
    ]  # fmt: skip
    orders = [("score_first", bias, g) for bias in ("", "scores", "logits") for g in grouped]
    orders += [("topk_first", bias, {}) for bias in ("", "logits")]
    scores = ("softmax", "sigmoid", "sqrtsoftplus")
    return [
        RouterSpec(
            score, order, "float32", bias, **groups, **whole,  # type: ignore[arg-type]
            scale=pick.choice([1.0, 2.5]),
            expert_scale=pick.random() < 0.3,
            sorted=pick.random() < 0.5,
            weight_dtype=pick.choice(["", "float32", "bfloat16", "float16"]),
        )
        for score, (order, bias, groups), whole in itertools.product(scores, orders, wholes)
    ]  # fmt: skip


@on_device
@pytest.mark.parametrize("part", range(9))
def test_every_combination(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pick = random.Random(part)
    for i, spec in enumerate(combinations()[part::9]):
        tokens_from(pick.choice([0, 0, 0, 256]), monkeypatch)
        experts = pick.choice([8, 12, 20, 64, 160])
        top_k = pick.choice([k for k in (1, 2, 5, 8) if k <= experts // 2])
        dtype = pick.choice(["float32", "float32", "bfloat16", "float16"])
        if serves(spec, getattr(torch, dtype), top_k, experts) is None:
            check(spec, draw(spec, pick.choice([1, 9, 40]), experts, dtype, seed=i), top_k, clear=0.5)
        else:
            pytest.fail(f"not served: {spec}")


@on_device
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_choice_on_logits_of_16_bits(score: Any, dtype: str) -> None:
    """Their weights too are of 16 bits; a bias of float32 makes the choice one of float32."""
    plain = RouterSpec(score, "topk_first", renormalise=score != "softmax")
    biased = replace(plain, bias="logits")
    assert serves(biased, getattr(torch, dtype), 4, 32, bias=torch.float32) is None
    for spec in (plain, biased):
        check(spec, draw(spec, 20, 32, dtype), 4)


@on_device
@pytest.mark.parametrize(
    "sizes", [(0, 8, 2), (1, 8, 2), (3, 1, 1), (5, 8, 8), (3, 60, 4), (3, 7, 7), (2, 1024, 32)], ids=str
)
@pytest.mark.parametrize("name", ["S1 renormalised", "T1", "G0"])
def test_sizes(name: str, sizes: tuple[int, int, int]) -> None:
    tokens, experts, top_k = sizes
    spec = next(r.spec for r in ROUTERS if r.name == name)
    if tokens:
        check(spec, draw(spec, tokens, experts), top_k)
    ids, weights = kernel()(*vars(draw(spec, tokens, experts)).values(), spec, top_k)
    assert ids.shape == weights.shape == (tokens, top_k)


@on_device
def test_groups_of_any_number_and_size() -> None:
    for groups, kept, size in [(1, 1, 6), (3, 2, 5), (5, 1, 4), (6, 6, 3), (7, 3, 1), (2, 1, 300)]:
        worth = "max" if size == 1 else "top2_sum"
        spec = RouterSpec("sigmoid", groups=groups, topk_groups=kept, group_score=worth, group_fill=-math.inf)  # type: ignore[arg-type]
        check(spec, draw(spec, 12, groups * size), min(3, kept * size))


@on_device
def test_several_tokens_in_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = next(r.spec for r in ROUTERS if r.name == "G1")
    given = draw(spec, 70, 64)
    tokens_from(1000, monkeypatch)
    alone = kernel()(given.logits, given.bias, given.scale, spec, 4)
    tokens_from(0, monkeypatch)
    together = kernel()(given.logits, given.bias, given.scale, spec, 4)
    assert torch.equal(alone[0], together[0])
    assert torch.equal(alone[1], together[1])


@on_device
def test_strides() -> None:
    spec = replace(next(r.spec for r in ROUTERS if r.name == "S3"), expert_scale=True)
    given = draw(spec, 9, 12)
    expected = kernel()(given.logits, given.bias, given.scale, spec, 3)
    apart = torch.zeros(9, 24, device=DEVICE)[:, ::2].copy_(given.logits)
    bias, scale = torch.stack([given.bias, given.scale], 1).unbind(1)  # type: ignore[list-item]
    for logits in (apart, given.logits.t().contiguous().t(), given.logits[:1].expand(9, 12)):
        ids, weights = kernel()(logits, bias, scale, spec, 3)
        rows = 1 if logits.stride(0) == 0 else 9
        assert torch.equal(ids[:rows], expected[0][:rows])
        assert torch.equal(weights[:rows], expected[1][:rows])


@on_device
@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_of_equal_experts_the_lowest_ids(router: Router) -> None:
    given = draw(router.spec, 4, E)
    logits = torch.zeros(4, E, device=DEVICE)
    logits[1], logits[2, ::2], logits[3, 1::2] = -7.5, -0.0, -0.0
    bias = None if given.bias is None else torch.zeros_like(given.bias)
    ids, _ = kernel()(logits, bias, given.scale, router.spec, 3)
    assert ids.tolist() == [[0, 1, 2]] * 4


@on_device
@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_logits_without_end(router: Router) -> None:
    """-inf, huge ones, and +inf where the score has a value for it."""
    spec = router.spec
    given = draw(spec, 12, E)
    x = given.logits
    x[0:4, ::2], x[4:8, 1] = -math.inf, 3e38
    x[6:8, 2:5] = -3e38
    x[8:10] *= 40
    if spec.score != "softmax":
        x[10, 5] = math.inf
    check(spec, given, K, clear=0.3)
    x = torch.full_like(x, -math.inf)
    ids, weights = kernel()(x, given.bias, given.scale, spec, K)
    check_ids(ids, given, K)
    kept = replace(spec, weights_from="scores")  # nothing else is chosen here
    torch.testing.assert_close(
        weights, reference.weights_of(x, ids, given.bias, given.scale, kept), rtol=1e-6, atol=0, equal_nan=True
    )


def by_rank(values: list[float], count: int) -> list[int]:
    """Indices of the largest: NaN above all, of equals the first."""
    return sorted(range(len(values)), key=lambda i: (not math.isnan(values[i]), -values[i], i))[:count]


def chosen(values: list[float], spec: RouterSpec, top_k: int) -> list[int]:
    """By hand: the choice of a row, groups included."""
    size = len(values) // spec.groups
    members = [sorted(values[g * size :][:size], key=lambda v: (not math.isnan(v), -v)) for g in range(spec.groups)]
    worth = [m[0] if spec.group_score == "max" else sum(m[:2]) for m in members]
    kept = by_rank(worth, spec.topk_groups)
    return by_rank([v if e // size in kept else spec.group_fill for e, v in enumerate(values)], top_k)


@on_device
@pytest.mark.parametrize("count", [1, 3, 12])
@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_nan_stands_first_as_in_topk(router: Router, count: int) -> None:
    """Of several, the lowest ids; groups of the lowest ids too."""
    spec, experts = router.spec, 12
    given = draw(spec, 10, experts)
    for row in given.logits:
        row[torch.randperm(experts, generator=torch.Generator().manual_seed(count))[:count]] = math.nan
    ids, weights = kernel()(given.logits, given.bias, given.scale, spec, 3)
    seen = reference.choice_of(given.logits, given.bias, replace(spec, groups=1, topk_groups=1))
    assert ids.tolist() == [chosen(row, spec, 3) for row in seen.tolist()]
    kept = replace(spec, weights_from="scores")  # nothing else is chosen here
    usual = reference.weights_of(given.logits, ids, given.bias, given.scale, kept)
    torch.testing.assert_close(weights, usual, rtol=1e-6, atol=0, equal_nan=True)


DEFECTS = {  # name → (router, what stands there and what stands there instead, …)
    "bias in the weights": (
        "G0", "    if router.renormalise:", "    w += tl.load(router.bias + found)\n    if router.renormalise:",
    ),
    "fill forgotten": ("G1", "choice = tl.where(kept, choice, router.fill)", "choice = choice + 0.0"),
    "scaled before it is renormalised": (
        "G0",
        "    w *= router.scale\n", "",
        "    if router.renormalise:", "    w *= router.scale\n    if router.renormalise:",
    ),
    "not scaled": ("S2", "w *= router.scale", "w *= 1.0"),
    "softmax over the chosen": ("S1", 'if router.order == "topk_first":', 'if router.order != "":'),
    "softmax over all": ("T1", 'if router.order == "topk_first":', 'if router.order == "":'),
    "a group is worth its best": ("G1", 'router.group_score == "top2_sum"', 'router.group_score == ""'),
    "a group too many": ("G1", "range(router.topk_groups)", "range(router.topk_groups + 1)"),
    "no clamp": ("S3", "whole < router.eps", "whole < 0.0"),
    "bias of the wrong expert": ("G0", "tl.load(router.bias + expert", "tl.load(router.bias + (expert ^ 1)"),
    "the next expert": ("S1", "chosen = chosen.to(tl.int32)", "chosen = chosen.to(tl.int32) + 2"),
    "a coarse exp": ("S1", "r * (1 / 24", "r * (1 / 23.9"),
    "log 2 in one part": ("S1", "    r = tl.fma(n, -1.4286068203094172e-6, r)\n", ""),
    "a coarse log1p": ("Q1", "1 / 7", "1 / 8"),
}  # fmt: skip


@on_device
@pytest.mark.parametrize("name", DEFECTS)
def test_seeded_defects_are_caught(name: str, tmp_path: Path) -> None:
    from moe_fx.kernels.triton import routing

    router, *changes = DEFECTS[name]
    text = Path(routing.__file__).read_text()
    for there, instead in zip(changes[::2], changes[1::2], strict=True):
        assert there in text
        text = text.replace(there, instead)
    path = tmp_path / "defective.py"
    path.write_text(text)
    found = importlib.util.spec_from_file_location("defective", path)
    assert found is not None
    assert found.loader is not None
    defective = importlib.util.module_from_spec(found)
    found.loader.exec_module(defective)
    spec = next(r.spec for r in ROUTERS if r.name == router)
    given = draw(spec, 20, E)
    far = Given(4 * given.logits - 12, None if given.bias is None else 8 * given.bias, given.scale)
    cases = [(given, K), (far, K), (replace(given, logits=over_the_range(E)), E)]

    def check_all(route: Route) -> None:
        for case, top_k in cases:
            check(spec, case, top_k, route, clear=0)

    check_all(kernel())
    with pytest.raises(AssertionError):
        check_all(defective.route)
