"""The op of a whole block: router and experts in one call.  Schema, fake and autograd; what runs is what runs ``ops``.

``moe(x, router_logits, operands, spec, binding, plan) -> (y, topk_ids, topk_weights)``
    the router of the spec on router_logits [T, E] floating, then the experts on x [T, H].  operands: those of the op
    ``experts``, then those of the router ("router_bias", "expert_scale", [E] each), as ``binding`` names them.
    topk_ids int64 [T, k] and topk_weights [T, k] are for whoever else reads them; gradients flow through the weights.
``moe_inline(the same) -> (y, topk_ids, topk_weights)``
    The same again, for a compiler, as ``experts_inline``.
``moe_train(the same) -> (y, topk_ids, topk_weights, saved)``
    What ``moe`` becomes where a gradient is wanted; saved: as of ``experts_train``.
``moe_backward(grad, grad_weights, x, router_logits, ids, weights, operands, saved, needs, spec, binding, plan)``
    ``-> (dx, dlogits, doperands)``; needs: for every operand, whether its gradient is wanted.

The router's linear stays in the graph, because models return its logits.  The ops are opaque to autocast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moe_fx import ops
from moe_fx.binding import parse_binding, split_router
from moe_fx.reasons import MoEFxRuntimeError
from moe_fx.reference.experts import dtype_of
from moe_fx.reference.router import route, route_backward, weights_dtype
from moe_fx.spec import MoESpec, RouterSpec, parse

Routed = tuple[Tensor, Tensor, Tensor]  # y, topk_ids, topk_weights
Route = Callable[[Tensor, Tensor | None, Tensor | None, RouterSpec, int], tuple[Tensor, Tensor]]


@lru_cache(maxsize=4096)
def _read(spec: str, binding: str) -> tuple[MoESpec, RouterSpec, str, tuple[str, ...]]:
    """(spec, its router, the binding of the experts alone, roles of the router's operands, which come last)."""
    try:
        parsed = parse(spec)
        experts_only, roles = split_router(parse_binding(binding))
    except (KeyError, TypeError, ValueError) as error:
        raise MoEFxRuntimeError(f"a fused op has attributes that cannot be read: {error}") from error
    if parsed.router is None:
        raise MoEFxRuntimeError(f"moe_fx::moe needs a spec with a router, got {spec!r}")
    return parsed, parsed.router, str(experts_only), roles


def _split(operands: list[Tensor], roles: tuple[str, ...]) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """operands → (those of the experts, the selection bias [E], the per-expert scale [E])."""
    at = len(operands) - len(roles)
    found = dict(zip(roles, operands[at:], strict=True))
    return list(operands[:at]), found.get("router_bias"), found.get("expert_scale")


def _check(x: Tensor, logits: Tensor, operands: list[Tensor], spec: str, binding: str) -> None:
    """A named error instead of a wrong read; the experts check the rest."""
    parsed, router, _, roles = _read(spec, binding)
    experts = parsed.expert.experts
    if x.ndim != 2 or logits.ndim != 2 or logits.shape[1] != experts or not logits.dtype.is_floating_point:
        got = f"{logits.dtype} {list(logits.shape)} for x {list(x.shape)}"
        raise MoEFxRuntimeError(f"router_logits must be floating [T, {experts}] for x [T, H], got {got}")
    if all(isinstance(n, int) for n in (x.shape[0], logits.shape[0])) and x.shape[0] != logits.shape[0]:
        raise MoEFxRuntimeError(f"router_logits has {logits.shape[0]} rows, x has {x.shape[0]}")
    if ("router_bias" in roles, "expert_scale" in roles) != (bool(router.bias), router.expert_scale):
        raise MoEFxRuntimeError(f"binding {binding!r} does not name the operands of {router}")
    for role, operand in zip(roles, operands[len(operands) - len(roles) :], strict=True):
        if operand.shape != (experts,):
            raise MoEFxRuntimeError(f"{role} must be [{experts}], got {list(operand.shape)}")


def routed(
    x: Tensor, logits: Tensor, operands: list[Tensor], spec: str, binding: str, by: Route = route
) -> tuple[Tensor, Tensor, list[Tensor], str]:
    """(ids, weights, the operands of the experts, their binding).  by: what routes; the default can be traced."""
    _check(x, logits, operands, spec, binding)
    ops.refuse_forward_mode(x, logits, *operands)
    parsed, router, experts_binding, roles = _read(spec, binding)
    mine, bias, scale = _split(operands, roles)
    return *by(logits, bias, scale, router, parsed.top_k), mine, experts_binding


def _moe(x: Tensor, logits: Tensor, operands: list[Tensor], spec: str, binding: str, plan: str) -> Routed:
    ids, weights, mine, experts_binding = routed(x, logits, operands, spec, binding, ops.route)
    _, bias, scale = _split(operands, _read(spec, binding)[-1])
    call = ops.call_of(x, ids, weights, mine, spec, experts_binding, plan)
    return ops.run(replace(call, logits=logits, router_bias=bias, expert_scale=scale)), ids, weights


def _train(
    x: Tensor, logits: Tensor, operands: list[Tensor], spec: str, binding: str, plan: str
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    masked = _read(spec, binding)[1].weights_from == "masked"
    by = route if masked else ops.route  # the backward asks the reference anew which groups are kept
    ids, weights, mine, experts_binding = routed(x, logits, operands, spec, binding, by)
    y, saved = torch.ops.moe_fx.experts_train(x, ids, weights, mine, spec, experts_binding, plan)
    return y, ids, weights, saved


def _moe_fake(x: Tensor, logits: Tensor, operands: list[Tensor], spec: str, binding: str, plan: str) -> Routed:
    _check(x, logits, operands, spec, binding)
    parsed, router, _, roles = _read(spec, binding)
    _, _, scale = _split(operands, roles)
    size = (x.shape[0], parsed.top_k)
    kind = weights_dtype(logits.dtype, None if scale is None else scale.dtype, router)
    y = x.new_empty(x.shape, dtype=dtype_of(parsed.combine.out_dtype, x.dtype))
    return y, x.new_empty(size, dtype=torch.int64), x.new_empty(size, dtype=kind)


def _train_fake(
    x: Tensor, logits: Tensor, operands: list[Tensor], spec: str, binding: str, plan: str
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    y, ids, weights = _moe_fake(x, logits, operands, spec, binding, plan)
    _, _, experts_binding, roles = _read(spec, binding)
    mine, _, _ = _split(operands, roles)
    return y, ids, weights, ops.saved_like(ops.Call(x, ids, weights, mine, (spec, experts_binding, plan)))


def _backward(
    grad: Tensor,
    grad_weights: Tensor,
    x: Tensor,
    logits: Tensor,
    ids: Tensor,
    weights: Tensor,
    operands: list[Tensor],
    saved: list[Tensor],
    needs: list[bool],
    spec: str,
    binding: str,
    plan: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    _, router, experts_binding, roles = _read(spec, binding)
    mine, bias, scale = _split(operands, roles)
    dx, dweights, doperands = torch.ops.moe_fx.experts_backward(
        grad, x, ids, weights, mine, saved, needs[: len(mine)], spec, experts_binding, plan
    )
    dlogits, dscale = route_backward(dweights + grad_weights, logits, ids, bias, scale, router)
    for role, operand, need in zip(roles, operands[len(mine) :], needs[len(mine) :], strict=True):
        d = dscale if role == "expert_scale" else torch.zeros_like(operand)
        doperands.append(operand.new_empty(0) if d is None or not need else d)
    return dx, dlogits, doperands


def _backward_fake(grad: Tensor, grad_weights: Tensor, *rest: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    x, logits, _, _, operands, _, needs, *_ = rest
    return ops.contiguous_like(x), ops.contiguous_like(logits), ops.gradients_like(operands, needs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, list[Tensor]]) -> None:
    x, logits, operands, *attrs = inputs
    _, ids, weights, saved = output
    roles = _read(attrs[0], attrs[1])[-1]
    chooses = [False] * (len(operands) - len(roles)) + [role == "router_bias" for role in roles]
    ctx.attrs, ctx.count = tuple(attrs), len(operands)
    ctx.needs = [o.requires_grad and not only for o, only in zip(operands, chooses, strict=True)]  # a choice has none
    ctx.set_materialize_grads(False)  # of ``saved``, which nobody reads
    ctx.mark_non_differentiable(ids)
    ctx.save_for_backward(x, logits, ids, weights, *operands, *saved)


def _differentiate(ctx: Any, grad: Tensor | None, _: object, grad_weights: Tensor | None, __: object) -> Any:
    if grad is None and grad_weights is None:
        return None, None, [None] * ctx.count, None, None, None
    x, logits, ids, weights, *rest = ctx.saved_tensors
    operands, saved = rest[: ctx.count], rest[ctx.count :]
    if grad is None:
        grad = x.new_zeros(x.shape, dtype=dtype_of(parse(ctx.attrs[0]).combine.out_dtype, x.dtype))
    grad_weights = torch.zeros_like(weights) if grad_weights is None else grad_weights
    dx, dlogits, doperands = torch.ops.moe_fx.moe_backward(
        grad, grad_weights, x, logits, ids, weights, operands, saved, ctx.needs, *ctx.attrs
    )
    wanted = [g if need else None for g, need in zip(doperands, ctx.needs, strict=True)]
    return dx, dlogits, wanted, None, None, None


_INPUTS = "Tensor x, Tensor router_logits, Tensor[] operands"
_KEPT = "Tensor x, Tensor router_logits, Tensor ids, Tensor weights, Tensor[] operands, Tensor[] saved, bool[] needs"
_ATTRS = "str spec, str binding, str plan"
ops.define("moe", f"({_INPUTS}, {_ATTRS}) -> (Tensor, Tensor, Tensor)", _moe, _moe_fake)
ops.define("moe_inline", f"({_INPUTS}, {_ATTRS}) -> (Tensor, Tensor, Tensor)", _moe, _moe_fake)
ops.define("moe_train", f"({_INPUTS}, {_ATTRS}) -> (Tensor, Tensor, Tensor, Tensor[])", _train, _train_fake)
ops.define(
    "moe_backward",
    f"(Tensor grad, Tensor grad_weights, {_KEPT}, {_ATTRS}) -> (Tensor, Tensor, Tensor[])",
    _backward,
    _backward_fake,
)
for _name in ("moe", "moe_inline"):
    ops.define_choice(_name, "moe_train", lambda x, logits, operands, *_: [x, logits, *operands])
ops.define_derivative("moe_train", _differentiate, _save)
ops.define_derivative("moe_backward", ops.no_second_derivative)
