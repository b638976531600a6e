"""The reference router: by hand, its derivative, its line of text, its dtypes, and ties as torch resolves them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_fx.reference.router import route, route_backward, weights_dtype, weights_of
from moe_fx.spec import ExpertSpec, MoESpec, RouterSpec, parse

from .formulas import ROUTERS, E, K, Router

T = 40


def operands(
    spec: RouterSpec, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor | None, Tensor | None]:
    draw = torch.Generator().manual_seed(seed)
    bias = 0.5 * torch.randn(E, generator=draw, dtype=torch.float64)
    scale = 0.5 + torch.rand(E, generator=draw, dtype=torch.float64)
    return (bias.to(dtype) if spec.bias else None), (scale.to(dtype) if spec.expert_scale else None)


def logits(seed: int = 1, tokens: int = T) -> Tensor:
    return 3 * torch.randn(tokens, E, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_is_the_formula_by_hand(router: Router) -> None:
    x = torch.cat([logits(), logits(2) - 12])  # far down, where a clamp shows
    bias, scale = operands(router.spec)
    ids, weights = route(x, bias, scale, router.spec, K)
    assert ids.dtype == torch.int64
    assert ids.is_contiguous()
    assert weights.is_contiguous()
    empty = [0.0] * E
    for t in range(len(x)):
        rows = (x[t].tolist(), empty if bias is None else bias.tolist(), empty if scale is None else scale.tolist())
        expected_ids, expected = router.by_hand(*rows, K)
        found = dict(zip(ids[t].tolist(), weights[t].tolist(), strict=True))
        assert found == pytest.approx(dict(zip(expected_ids, expected, strict=True)), rel=1e-12)
        if router.spec.sorted:
            assert ids[t].tolist() == expected_ids


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_backward_is_that_of_autograd(router: Router, top_k: int) -> None:
    """Against finite differences, and against autograd through the same forward."""
    x = logits(3, 5).requires_grad_()
    bias, scale = operands(router.spec)
    leaves = (x,) if scale is None else (x, scale.requires_grad_())

    def weights(x: Tensor, *scales: Tensor) -> Tensor:
        return route(x, bias, scales[0] if scales else None, router.spec, top_k)[1]

    assert torch.autograd.gradcheck(weights, leaves)
    w = weights(*leaves)
    dw = torch.randn(w.shape, dtype=w.dtype)
    expected = torch.autograd.grad(w, leaves, dw)
    with torch.no_grad():
        ids = route(x, bias, scale, router.spec, top_k)[0]
        found = [g for g in route_backward(dw, x, ids, bias, scale, router.spec) if g is not None]
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_backward_of_a_clamp_that_acts() -> None:
    spec = RouterSpec("sigmoid", renormalise=True, eps=0.5, eps_form="clamp")
    x = (logits(4, 6) - torch.tensor([[0.0], [20.0]]).repeat(3, 1)).requires_grad_()
    ids, w = route(x, None, None, spec, K)
    assert set((w.sum(-1) < 0.999).tolist()) == {True, False}
    (expected,) = torch.autograd.grad(w.square().sum(), x)
    torch.testing.assert_close(route_backward(2 * w.detach(), x.detach(), ids, None, None, spec)[0], expected)


def test_backward_of_scores_that_a_group_masked() -> None:
    """k larger than the experts that are kept: masked ones are chosen with weight 0 and have no gradient."""
    spec = RouterSpec(groups=4, topk_groups=1, weights_from="masked")
    x = logits(5, 6).requires_grad_()
    ids, w = route(x, None, None, spec, 4)
    assert int((w == 0).sum()) == 6 * 2
    (expected,) = torch.autograd.grad(w.square().sum(), x)
    torch.testing.assert_close(route_backward(2 * w.detach(), x.detach(), ids, None, None, spec)[0], expected)


@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_weights_of_the_chosen_ids(router: Router) -> None:
    x, (bias, scale) = logits(), operands(router.spec)
    ids, weights = route(x, bias, scale, router.spec, K)
    assert torch.equal(weights_of(x, ids, bias, scale, router.spec), weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_ties_are_resolved_as_the_model_resolves_them(router: Router, dtype: torch.dtype) -> None:
    """The same bits as the model's own code, dtypes included, on logits of which many are equal."""
    draw = torch.Generator().manual_seed(0)
    x = torch.cat([
        torch.randint(-1, 2, (200, E), generator=draw).to(dtype),
        torch.randn(200, E, generator=draw).to(dtype),
        torch.full((4, E), 0.25, dtype=dtype),
        100 * torch.randint(0, 2, (50, E), generator=draw).to(dtype),
    ])  # fmt: skip
    bias = torch.randint(0, 2, (E,), generator=draw).float() / 2
    scale = torch.rand(E, generator=draw).to(dtype)
    if router.name in ("T1", "G0 bias on logits"):
        bias = bias.to(dtype)
    ids, weights = router.written(x, bias, scale)
    wide = "float32" if router.name in ("S1", "S1 renormalised", "G0", "S2", "S3", "S1g") else ""
    spec = replace(router.spec, score_dtype=wide, weight_dtype=str(weights.dtype).removeprefix("torch."))
    found = route(x, bias if spec.bias else None, scale if spec.expert_scale else None, spec, K)
    assert torch.equal(found[0], ids)
    assert torch.equal(found[1], weights)


@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_prints_and_parses(router: Router) -> None:
    for spec in (router.spec, replace(router.spec, score_dtype="float32", weight_dtype="bfloat16")):
        whole = MoESpec(K, ExpertSpec(E, 4, 4), router=spec)
        assert parse(str(whole)) == whole
        assert "\n" not in str(whole)


def test_the_dtype_of_the_weights() -> None:
    for score, cast, scaled in (("", "", False), ("float32", "", True), ("float32", "bfloat16", False)):
        spec = RouterSpec(score_dtype=score, weight_dtype=cast, expert_scale=scaled)
        scale = torch.ones(E, dtype=torch.bfloat16) if scaled else None
        weights = route(logits().bfloat16(), None, scale, spec, K)[1]
        assert weights.dtype == weights_dtype(torch.bfloat16, None if scale is None else scale.dtype, spec)


@pytest.mark.parametrize(
    "spec, bias",
    [
        (RouterSpec(bias="scores"), None),
        (RouterSpec(), torch.zeros(E)),
        (RouterSpec(order="topk_first", bias="scores"), torch.zeros(E)),
        (RouterSpec(order="topk_first", groups=4), None),
        (RouterSpec(groups=3), None),
        (RouterSpec(groups=4, topk_groups=5), None),
    ],
)
def test_what_is_no_router_is_an_error(spec: RouterSpec, bias: Tensor | None) -> None:
    with pytest.raises(ValueError):
        route(logits().float(), bias, None, spec, K)


MUTANTS = [
    ("S1", dict(order="topk_first")), ("S1", dict(renormalise=True)), ("S1 renormalised", dict(renormalise=False)),
    ("T1", dict(order="score_first")), ("G0", dict(score="softmax")), ("G0", dict(scale=1.0)),
    ("G0", dict(bias="logits")),
    ("G0 bias on logits", dict(score="softmax")), ("G1", dict(group_fill=0.0)), ("G1", dict(group_score="max")),
    ("G1", dict(topk_groups=3)), ("G1", dict(groups=2)), ("S2", dict(group_score="top2_sum")), ("S3", dict(eps=1e-6)),
    ("S3", dict(eps_form="add")), ("Q1", dict(score="sigmoid")), ("S2 top-2 sums", dict(renormalise=False)),
]  # fmt: skip


@pytest.mark.parametrize("name, change", MUTANTS, ids=str)
def test_seeded_mutants_are_caught(name: str, change: dict[str, object]) -> None:
    router = next(r for r in ROUTERS if r.name == name)
    spec = replace(router.spec, **change)  # type: ignore[arg-type]
    x = torch.cat([logits(), logits(2) - 12])
    bias, scale = operands(router.spec)
    bias = None if bias is None else 4 * bias - 2  # below a fill of zero too
    _, expected = route(x, bias, scale, router.spec, K)
    _, found = route(x, bias, scale, spec, K)
    assert not math.isclose(float((found - expected).abs().max()), 0.0, abs_tol=1e-9)
