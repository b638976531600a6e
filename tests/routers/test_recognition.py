"""Routers as models write them are recognised by value and fused; what only looks like one is left, with a reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_fx.passes.routers import forget
from moe_fx.passes.routers import rewrite as routers_rewrite
from moe_fx.passes.routers.match import (
    Hypothesis,
    _close,
    _run,
    _run_exact,
    _same_ids,
    _weights_of,
    recognise,
)
from moe_fx.passes.routers.region import RouterRegion
from moe_fx.passes.routers.samples import EVERY, EXACT, RouterSampler
from moe_fx.reasons import Reject
from moe_fx.spec import RouterSpec
from tests.kernels.cases import error

from .formulas import ROUTERS, E, K, Router
from .helpers import Block, Fused, results, x_of


@pytest.fixture(autouse=True)
def _fresh() -> None:
    forget()


def same_mathematics(found: RouterSpec, wanted: RouterSpec) -> bool:
    """But for dtypes, and for what k = 2 of two kept groups cannot tell."""
    neutral = dict(score_dtype="", weight_dtype="")
    return replace(found, **neutral) == replace(wanted, **neutral)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_is_fused_with_the_same_bits(router: Router, dtype: torch.dtype) -> None:
    block = Block(router.written, dtype)
    fused = Fused(block)
    with torch.no_grad():
        for rows in (24, 40):  # the second length is dynamic
            y, logits = fused(x_of(rows, dtype))
            expected, expected_logits = block(x_of(rows, dtype))
            assert torch.equal(logits, expected_logits)
            assert error(y, expected.double()) <= 4 * torch.finfo(dtype).eps  # roundings of both
    for outcome in fused.outcomes:
        assert outcome.router is not None, outcome.reason
        assert same_mathematics(outcome.router, router.spec), outcome.router
    assert fused.calls("moe_fx.moe") == len(fused.outcomes)
    assert fused.calls("experts") == fused.calls("topk") == fused.calls("softmax") == fused.calls("gather") == 0


@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_trains_as_the_original(router: Router) -> None:
    block = Block(router.written)
    fused = Fused(block)
    expected, expected_grads = results(block, block, x_of())
    found, grads = results(fused, block, x_of())
    assert all(o.router for o in fused.outcomes), fused.outcomes
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], atol=1e-4, rtol=1e-3, msg=name)


# --- look-alikes


def _picked(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = logits.softmax(-1).topk(K, dim=-1)
    return ids, weights


def bias_in_the_weights(logits: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = torch.topk(logits.sigmoid() + bias, K, dim=-1)
    return ids, weights


def odd_fill(logits: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    scores = logits.sigmoid()
    worth = scores.view(-1, 4, E // 4).amax(-1)
    mask = torch.zeros_like(worth).scatter(1, worth.topk(2)[1], 1.0).repeat_interleave(E // 4, -1).bool()
    ids = scores.masked_fill(~mask, 0.5).topk(K)[1]
    return ids, scores.gather(1, ids)


def argmax(logits: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    first = logits.argmax(-1, keepdim=True)
    second = logits.scatter(1, first, float("-inf")).argmax(-1, keepdim=True)
    ids = torch.cat([first, second], -1)
    return ids, logits.softmax(-1).gather(1, ids)


def by_sorting(logits: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = logits.softmax(-1).sort(dim=-1, descending=True)
    return ids[:, :K], weights[:, :K]


def swapped(logits: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    ids, weights = _picked(logits)
    return ids, weights.flip(-1)


def shifted(logits: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    ids, weights = _picked(logits)
    return (ids + 1).clamp(0, E - 1), weights


def smallest(logits: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = logits.softmax(-1).topk(K, dim=-1, largest=False)
    return ids, weights


def squared(logits: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    ids, weights = _picked(logits)
    return ids, weights.square()


def capacity(logits: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    ids, weights = _picked(logits)
    place = F.one_hot(ids[:, 0], E).cumsum(0).gather(1, ids[:, :1])
    return ids, weights * (place <= 1000)


def over_the_batch(logits: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    ids, weights = _picked(logits)
    return ids, weights / weights.sum()


def noisy(logits: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return _picked(logits + 1e-6 * torch.rand_like(logits))


def scale_before_renormalising(logits: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    ids, weights = _picked(logits)
    weights = weights * scale[ids]
    return ids, weights / weights.sum(-1, keepdim=True)


def written_over(logits: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    ids, weights = _picked(logits)
    logits.mul_(2)
    return ids, weights


def other_dtype(logits: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Scores in float32, chosen in bfloat16: other ties."""
    scores = logits.float().softmax(-1)
    ids = scores.bfloat16().topk(K)[1]
    return ids, scores.gather(1, ids)


LOOK_ALIKES: list[tuple[Callable[..., Any], str]] = [
    (bias_in_the_weights, "no known formula"),
    (odd_fill, "no known way of choosing"),
    (argmax, "no topk"),
    (by_sorting, "no topk"),
    (swapped, "no known formula"),
    (shifted, "no known way of choosing"),
    (smallest, "no known way of choosing"),
    (squared, "no known formula"),
    (capacity, "cumsum"),
    (over_the_batch, "no known formula"),
    (scale_before_renormalising, "no known formula"),
    (written_over, "writes to"),
    (other_dtype, "verify"),
]


@pytest.mark.parametrize("written, words", LOOK_ALIKES, ids=lambda v: getattr(v, "__name__", ""))
def test_look_alikes_are_left_with_a_reason(written: Any, words: str) -> None:
    block = Block(written)
    fused = Fused(block, dynamic=True)
    with torch.no_grad():
        y, _ = fused(x_of())
        torch.testing.assert_close(y, block(x_of())[0], atol=1e-5, rtol=1e-4)
    (outcome,) = fused.outcomes
    assert outcome.router is None, outcome.router
    assert re.search(words, str(outcome.reason)), outcome.reason
    assert fused.calls("moe_fx.moe") == 0


class Counted(Block):
    """The weights change with a number that is an argument."""

    def forward(self, x: Tensor, number: int) -> tuple[Any, ...]:  # type: ignore[override]
        logits = self.logits(x)
        ids, weights = _picked(logits)
        return self.experts(x, ids, self.written(weights, x.shape[0], number)), logits  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        lambda weights, tokens, number: weights * number / tokens,
        lambda weights, tokens, number: weights * (1 + tokens - number),
        lambda weights, tokens, number: weights.roll(number, 0),
    ],
    ids=["quotient", "difference", "roll"],
)
def test_an_argument_does_not_cancel_the_number_of_tokens(change: Any) -> None:
    block = Counted(change)
    fused = Fused(block, dynamic=True)
    with torch.no_grad():
        for number in (5, 7):
            torch.testing.assert_close(fused(x_of(), number), block(x_of(), number), atol=1e-4, rtol=1e-4)
    (outcome,) = fused.outcomes
    assert outcome.router is None, outcome.router


def test_noise_on_the_logits_stays_outside() -> None:
    """What comes before the logits is not the router's: the noisy logits are the op's input."""
    fused = Fused(Block(noisy))
    with torch.no_grad():
        fused(x_of())
    (outcome,) = fused.outcomes
    assert outcome.router == RouterSpec()
    assert fused.calls("rand_like") == 1


def test_a_missing_renormalisation_is_another_spec() -> None:
    for written, renormalise in ((ROUTERS[0].written, False), (ROUTERS[1].written, True)):
        fused = Fused(Block(written))
        with torch.no_grad():
            fused(x_of())
        assert fused.outcomes[0].router.renormalise is renormalise  # type: ignore[union-attr]


def detached(logits: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    ids, weights = _picked(logits)
    return ids, weights.detach() * 1.5


def test_detached_weights_are_left_when_training() -> None:
    block = Block(detached)
    fused = Fused(block)
    expected, found = results(block, block, x_of()), results(fused, block, x_of())
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    assert fused.outcomes[0].reason is not None
    assert fused.outcomes[0].reason.code == "verify.gradients"
    fused = Fused(Block(detached))
    with torch.no_grad():
        fused(x_of())
    assert fused.outcomes[0].router == RouterSpec(scale=1.5)


# --- readers of what is inside


class Talkative(Block):
    """Returns what its router made, before and after the experts run, and a loss on its scores."""

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        logits = self.logits(x)
        scores = logits.softmax(-1)
        weights, ids = scores.topk(K, dim=-1)
        early = (ids + 1, weights * 2)
        weights = weights / weights.sum(-1, keepdim=True)
        y = self.experts(x, ids, weights)
        loss = scores.mean(0) @ F.one_hot(ids, E).float().mean((0, 1))
        return y, ids, weights, weights * 3, loss, logits, *early


def test_inner_values_keep_their_readers() -> None:
    block = Talkative(ROUTERS[1].written)
    fused = Fused(block)
    expected, expected_grads = results(block, block, x_of())
    found, grads = results(fused, block, x_of())
    assert fused.outcomes[0].router == RouterSpec(renormalise=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(grads, expected_grads, atol=1e-4, rtol=1e-3)
    assert torch.equal(fused(x_of())[1], block(x_of())[1])


def test_a_frozen_router_and_a_frozen_scale() -> None:
    block = Block(next(r for r in ROUTERS if r.name == "S1g").written)
    block.scale.requires_grad_(False)
    block.gate.requires_grad_(False)
    fused = Fused(block)
    expected, found = results(block, block, x_of()), results(fused, block, x_of())
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    assert fused.outcomes[0].router is not None


# --- mutants of the specification


def region_of(router: Router) -> tuple[RouterRegion, Hypothesis]:
    kept: list[tuple[RouterRegion, Any]] = []

    def spy(region: RouterRegion, training: bool) -> Any:
        kept.append((region, recognise(region, training)))
        return Reject("internal", "kept as it is")

    original, routers_rewrite.recognise = routers_rewrite.recognise, spy
    try:
        with torch.no_grad():
            Fused(Block(router.written), dynamic=True)(x_of())
    finally:
        routers_rewrite.recognise = original
    return next((r, h) for r, h in kept if isinstance(h, Hypothesis))


def holds(region: RouterRegion, hypothesis: Hypothesis) -> bool:
    """What ``recognise`` asks of a hypothesis in float64."""
    samples = RouterSampler(region).samples(EXACT, torch.float64)
    seen = [_run_exact(region, s) for s in samples]
    return all(_same_ids(hypothesis, s, region.top_k) and _close(_weights_of(hypothesis, s), s.weights) for s in seen)


@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_mutants_do_not_hold(router: Router) -> None:
    region, found = region_of(router)
    assert holds(region, found)
    spec = found.spec
    other = {"softmax": "sigmoid", "sigmoid": "sqrtsoftplus", "sqrtsoftplus": "softmax"}[spec.score]
    changes: list[dict[str, Any]] = [dict(score=other), dict(scale=spec.scale * 1.001)]
    if not (spec.order == "topk_first" and spec.score == "softmax"):  # that sums to one already
        changes.append(dict(renormalise=not spec.renormalise, eps=0.0, eps_form="add"))
    if spec.eps and spec.bias:
        changes += [dict(eps=spec.eps * 2), dict(eps=0.0, eps_form="add")]
        changes.append(dict(eps_form="add" if spec.eps_form == "clamp" else "clamp"))
    if spec.bias == "scores":
        changes.append(dict(bias="logits"))
    if spec.groups > 1:
        flipped = "max" if spec.group_score == "top2_sum" else "top2_sum"
        changes += [dict(group_score=flipped), dict(topk_groups=1), dict(groups=2, topk_groups=1)]
    if spec.groups > 1 and spec.group_score != "max":  # the best two are in the two groups of the largest best
        changes += [dict(groups=1, topk_groups=1, weights_from="scores")]
        changes += [dict(group_fill=0.0), dict(topk_groups=3)] if spec.bias else []
    for change in changes:
        assert not holds(region, replace(found, spec=replace(spec, **change))), change


def test_samples_hold_ties_and_both_sides_of_an_epsilon() -> None:
    region, _ = region_of(next(r for r in ROUTERS if r.name == "G1"))
    kinds = {s.label.split()[0]: s for s in RouterSampler(region).samples(EVERY, None)}
    assert kinds.keys() == set(EVERY)
    ties = _run(region, kinds["ties"])
    top = ties.sample.logits.sigmoid().sort(-1).values
    assert bool((top[:, 1:] == top[:, :-1]).any(-1).all())
    sums = next(s for s in RouterSampler(region).samples(("small",), torch.float64)).logits.sigmoid().sum(-1)
    assert bool((sums < 1e-20).any())
    assert bool((sums > 1e-20).any())
