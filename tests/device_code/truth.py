"""How the router's kernel is held to the specification.

The truth of a choice is the reference's in float64.  Another expert may stand in a place where the two differ by less
than float32 can tell: SLACK units of what was added up.  A choice on the logits themselves has no such room.  Weights
are held to the tolerance rule, value by value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_fx.reference import router as reference
from moe_fx.reference.experts import dtype_of
from moe_fx.spec import RouterSpec

from .here import DEVICE

EPS = torch.finfo(torch.float32).eps
TINY = 1e-37  # below it floats have fewer bits
SLACK = 4  # units in the last place
Route = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Given:
    """The operands of a router."""

    logits: Tensor
    bias: Tensor | None
    scale: Tensor | None

    def exact(self) -> Given:
        return Given(*(None if t is None else t.double() for t in (self.logits, self.bias, self.scale)))  # type: ignore[arg-type]


def draw(spec: RouterSpec, tokens: int, experts: int, dtype: str = "float32", seed: int = 0, size: float = 3) -> Given:
    source = torch.Generator().manual_seed(seed)
    logits = (size * torch.randn(tokens, experts, generator=source)).to(getattr(torch, dtype))
    bias = 0.5 * torch.randn(experts, generator=source) if spec.bias else None
    scale = 0.5 + torch.rand(experts, generator=source) if spec.expert_scale else None
    return Given(*(None if t is None else t.to(DEVICE) for t in (logits, bias, scale)))  # type: ignore[arg-type]


def kernel() -> Route:
    from moe_fx.kernels.triton.routing import route

    return route


def check(spec: RouterSpec, given: Given, top_k: int, route: Route | None = None, clear: float = 0.9) -> None:
    """``route``, the kernel, gives what the spec means.  clear: the share of rows whose groups float32 can tell apart,
    at least."""
    ids, weights = (route or kernel())(given.logits, given.bias, given.scale, spec, top_k)
    check_ids(ids, given, top_k)
    usual = reference.weights_of(given.logits, ids, given.bias, given.scale, spec)
    assert weights.dtype == usual.dtype
    assert weights.is_contiguous()
    exact, wide = given.exact(), replace(spec, score_dtype="float64", weight_dtype="")
    choice = reference.choice_of(exact.logits, exact.bias, wide)
    mass = masses(exact, wide)
    certain = groups_are_clear(exact, mass, wide)
    assert certain.double().mean() >= clear
    best = choice.topk(top_k)
    ours = choice.gather(1, ids)
    room = SLACK * EPS * (mass.gather(1, ids) + mass.gather(1, best.indices))
    same = (ours == best.values) | ((ours - best.values).abs() <= room) | (ours.isnan() & best.values.isnan())
    wrong = ~same.all(1) & certain
    assert not wrong.any(), f"{spec}: {ids[wrong][:2]}, but {best.indices[wrong][:2]}"
    truth = reference.weights_of(exact.logits, ids, exact.bias, exact.scale, wide)[certain]
    found, usual = weights[certain].double(), usual[certain].double()
    narrow = max(torch.finfo(dtype_of(spec.score_dtype, given.logits.dtype)).eps, torch.finfo(weights.dtype).eps)
    alike = (found == truth) | (found.isnan() & truth.isnan())
    own = errors(usual, truth)
    bound = 2 * (own[own.isfinite()].max() if own.isfinite().any() else 0) + 4 * narrow
    far = ~alike & ~(errors(found, truth) <= bound)
    assert not far.any(), f"{spec}: {found[far][:4]} for {truth[far][:4]}, bound {float(bound):.1e}"


def check_ids(ids: Tensor, given: Given, top_k: int) -> None:
    tokens, experts = given.logits.shape
    assert ids.dtype == torch.int64
    assert ids.shape == (tokens, top_k)
    assert ids.is_contiguous()
    assert bool(((ids >= 0) & (ids < experts)).all())
    assert all(len(set(row)) == top_k for row in ids.tolist())


def errors(found: Tensor, truth: Tensor) -> Tensor:
    return (found - truth).abs() / truth.abs().clamp(min=TINY)


def masses(exact: Given, spec: RouterSpec) -> Tensor:
    """[T, E]: what is added up to each value of the choice, in absolute value; 0 where nothing is computed."""
    bias = 0 if exact.bias is None else exact.bias.abs()
    if spec.order == "topk_first" or spec.bias == "logits":
        return exact.logits.abs() + bias if spec.bias else torch.zeros_like(exact.logits)
    plain = replace(spec, bias="", groups=1, topk_groups=1)
    return 2 * reference.choice_of(exact.logits, None, plain).abs() + bias + TINY


def groups_are_clear(exact: Given, mass: Tensor, spec: RouterSpec) -> Tensor:
    """bool [T]: the worst group that is kept is better than the best that is not, by more than float32 may err."""
    tokens = len(exact.logits)
    if spec.topk_groups == spec.groups:
        return torch.ones(tokens, dtype=torch.bool, device=mass.device)
    choice = reference.choice_of(exact.logits, exact.bias, replace(spec, groups=1, topk_groups=1))
    members = choice.view(tokens, spec.groups, -1).sort(descending=True).values
    worth = (members[..., 0] if spec.group_score == "max" else members[..., :2].sum(-1)).sort(descending=True).values
    gap = worth[:, spec.topk_groups - 1] - worth[:, spec.topk_groups]
    return gap > 4 * SLACK * EPS * mass.amax(1)
