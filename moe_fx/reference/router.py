"""The router of a spec: from logits to ids and weights, and back.

Order and dtypes of the operations are part of the meaning: with the same ``topk`` on the same values in the same dtype,
equal scores are resolved as the original resolves them.  In float64 this is the yardstick.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_fx.reference.experts import dtype_of
from moe_fx.spec import RouterSpec

_SOFTPLUS_LINEAR = 20.0  # above it torch's softplus is the identity


def route(
    logits: Tensor, bias: Tensor | None, expert_scale: Tensor | None, spec: RouterSpec, top_k: int
) -> tuple[Tensor, Tensor]:
    """logits [T, E], bias and expert_scale [E] where the spec has them → (ids int64 [T, k], weights [T, k]).

    Both are contiguous.  Raises ValueError for an operand that is missing or not meant, and for a spec that is none.
    """
    _check(logits, bias, expert_scale, spec)
    values, choice, keep = _choice(logits, bias, spec)
    ids = torch.topk(choice, top_k, dim=-1, sorted=spec.sorted).indices
    return ids, _weights(values, ids, keep, expert_scale, spec)


def choice_of(logits: Tensor, bias: Tensor | None, spec: RouterSpec) -> Tensor:
    """What the choosing topk sees, [T, E]."""
    return _choice(logits, bias, spec)[1]


def weights_of(
    logits: Tensor, ids: Tensor, bias: Tensor | None, expert_scale: Tensor | None, spec: RouterSpec
) -> Tensor:
    """The weights [T, k] that ``route`` would give to ``ids`` had it chosen them."""
    _check(logits, bias, expert_scale, spec)
    values, _, keep = _choice(logits, bias, spec)
    return _weights(values, ids, keep, expert_scale, spec)


def route_backward(
    dweights: Tensor, logits: Tensor, ids: Tensor, bias: Tensor | None, expert_scale: Tensor | None, spec: RouterSpec
) -> tuple[Tensor, Tensor | None]:
    """dweights [T, k] → (dlogits [T, E], dscale [E] or None): the derivative of ``route``'s weights, given its ``ids``.

    The selection bias has no derivative: it acts on the choice alone.  Everything is recomputed from the logits.
    """
    values, _, keep = _choice(logits, bias, spec)
    keep = keep if spec.weights_from == "masked" else None
    picked = _picked(values, ids, keep, spec)
    unscaled, total = _renormalised(picked, spec)
    scaled = unscaled * spec.scale if spec.scale != 1 else unscaled
    dscale = None
    factor = None if expert_scale is None else expert_scale[ids]
    d = dweights.to(scaled.dtype if factor is None else torch.promote_types(scaled.dtype, factor.dtype))
    if expert_scale is not None and factor is not None:
        flat = (d * scaled).flatten().to(expert_scale.dtype)
        dscale = torch.zeros_like(expert_scale).index_add_(0, ids.flatten(), flat)
        d = (d * factor).to(scaled.dtype)
    if spec.scale != 1:
        d = d * spec.scale
    if total is not None:
        inner = (d * unscaled).sum(-1, keepdim=True)
        if spec.eps_form == "clamp":
            inner = inner * (picked.sum(-1, keepdim=True) >= spec.eps)
        d = (d - inner) / total
    if spec.order == "topk_first":
        chosen = logits.gather(1, ids)
        dlogits = torch.zeros_like(logits, memory_format=torch.contiguous_format)
        return dlogits.scatter_add_(1, ids, _scores_backward(d, chosen, spec)), dscale
    if keep is not None:
        d = d.masked_fill(~keep.gather(1, ids), 0.0)
    dvalues = torch.zeros_like(values, memory_format=torch.contiguous_format).scatter_add_(1, ids, d)
    return _scores_backward(dvalues, logits, spec), dscale


def weights_dtype(logits: torch.dtype, expert_scale: torch.dtype | None, spec: RouterSpec) -> torch.dtype:
    """dtype of the weights that ``route`` gives."""
    wide = dtype_of(spec.score_dtype, logits)
    return dtype_of(spec.weight_dtype, wide if expert_scale is None else torch.promote_types(wide, expert_scale))


def _check(logits: Tensor, bias: Tensor | None, expert_scale: Tensor | None, spec: RouterSpec) -> None:
    if (bias is not None) != bool(spec.bias) or (expert_scale is not None) != spec.expert_scale:
        raise ValueError(f"operands do not fit {spec}: bias {bias is not None}, scale {expert_scale is not None}")
    if spec.order == "topk_first" and (spec.bias == "scores" or spec.groups > 1):
        raise ValueError("topk_first has no scores to bias and no groups: the choice is on the logits")
    if spec.groups < 1 or logits.shape[-1] % spec.groups or not 1 <= spec.topk_groups <= spec.groups:
        raise ValueError(f"{spec.topk_groups} of {spec.groups} groups of {logits.shape[-1]} experts")


def _scores(logits: Tensor, spec: RouterSpec) -> Tensor:
    """The score function along the last dimension, in ``score_dtype``."""
    wide = dtype_of(spec.score_dtype, logits.dtype)
    match spec.score:
        case "softmax":
            return F.softmax(logits, dim=-1, dtype=wide)
        case "sigmoid":
            return torch.sigmoid(logits.to(wide))
        case "sqrtsoftplus":
            return F.softplus(logits.to(wide)).sqrt()
    raise ValueError(f"no score function {spec.score!r}")


def _scores_backward(dscores: Tensor, logits: Tensor, spec: RouterSpec) -> Tensor:
    """Gradient of the logits, in their dtype."""
    scores = _scores(logits, spec)
    match spec.score:
        case "softmax":
            d = scores * (dscores - (dscores * scores).sum(-1, keepdim=True))
        case "sigmoid":
            d = dscores * scores * (1 - scores)
        case _:
            wide = logits.to(scores.dtype)
            slope = torch.where(wide > _SOFTPLUS_LINEAR, torch.ones_like(wide), torch.sigmoid(wide))
            d = dscores / (2 * scores) * slope
    return d.to(logits.dtype)


def _choice(logits: Tensor, bias: Tensor | None, spec: RouterSpec) -> tuple[Tensor, Tensor, Tensor | None]:
    """(what the weights are picked from, what topk sees, both [T, E]; bool [T, E]: the expert's group is kept, or None
    without groups)."""
    values = _scores(logits, spec) if spec.order == "score_first" else logits
    choice = logits if spec.bias == "logits" else values
    if bias is not None:
        choice = choice + bias
    if spec.groups == 1:
        return values, choice, None
    grouped = choice.view(-1, spec.groups, choice.shape[-1] // spec.groups)
    worth = grouped.max(dim=-1).values if spec.group_score == "max" else grouped.topk(2, dim=-1).values.sum(dim=-1)
    best = torch.topk(worth, spec.topk_groups, dim=-1, sorted=False).indices
    kept = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, best, True)
    keep = kept.unsqueeze(-1).expand_as(grouped).reshape(choice.shape)
    return values, choice.masked_fill(~keep, spec.group_fill), keep


def _picked(values: Tensor, ids: Tensor, keep: Tensor | None, spec: RouterSpec) -> Tensor:
    """[T, k]: what becomes the weights of the chosen experts."""
    if spec.weights_from == "masked" and keep is not None:
        values = values.masked_fill(~keep, spec.group_fill)
    picked = values.gather(1, ids)
    return _scores(picked, spec) if spec.order == "topk_first" else picked


def _renormalised(picked: Tensor, spec: RouterSpec) -> tuple[Tensor, Tensor | None]:
    """(picked over its sum, that sum) or (picked, None)."""
    if not spec.renormalise:
        return picked, None
    total = picked.sum(dim=-1, keepdim=True)
    if spec.eps_form == "clamp":
        total = total.clamp(min=spec.eps)
    elif spec.eps:
        total = total + spec.eps
    return picked / total, total


def _weights(values: Tensor, ids: Tensor, keep: Tensor | None, expert_scale: Tensor | None, spec: RouterSpec) -> Tensor:
    weights, _ = _renormalised(_picked(values, ids, keep, spec), spec)
    if spec.scale != 1:
        weights = weights * spec.scale
    if expert_scale is not None:
        weights = weights * expert_scale[ids]
    return weights.to(dtype_of(spec.weight_dtype, weights.dtype))
