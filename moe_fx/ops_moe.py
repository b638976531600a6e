"""The op of a whole block: router and experts in one call.  Schema, fake and autograd; what runs is what runs ``ops``.

``moe(x, router_logits, operands, spec, binding, plan) -> (y, topk_ids, topk_weights)``
    the router of the spec on router_logits [T, E] floating, then the experts on x [T, H].  operands: those of the op
    ``experts``, then those of the router ("router_bias", "expert_scale", [E] each), as ``binding`` names them.
    topk_ids int64 [T, k] and topk_weights [T, k] are for whoever else reads them; gradients flow through the weights.
``moe_backward(grad, grad_weights, x, router_logits, ids, weights, operands, needs, spec, binding, plan)``
    ``-> (dx, dlogits, doperands)``; needs: for every operand, whether its gradient is wanted.

The router's linear stays in the graph, because models return its logits.  The op is opaque to autocast, as ``experts``.
"""

from __future__ import annotations

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
    return operands[:at], found.get("router_bias"), found.get("expert_scale")


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


@torch.library.custom_op("moe_fx::moe", mutates_args=())
def moe(
    x: Tensor, router_logits: Tensor, operands: list[Tensor], spec: str, binding: str, plan: str
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, router_logits, operands, spec, binding)
    parsed, router, experts_binding, roles = _read(spec, binding)
    mine, bias, scale = _split(list(operands), roles)
    with torch._C._DisableAutocast():
        ids, weights = route(router_logits, bias, scale, router, parsed.top_k)
    y = torch.ops.moe_fx.experts(x, ids, weights, mine, spec, experts_binding, plan)
    return y, ids, weights


@moe.register_fake
def _moe_fake(
    x: Tensor, router_logits: Tensor, operands: list[Tensor], spec: str, binding: str, plan: str
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, router_logits, operands, spec, binding)
    parsed, router, _, roles = _read(spec, binding)
    _, _, scale = _split(list(operands), roles)
    size = (x.shape[0], parsed.top_k)
    kind = weights_dtype(router_logits.dtype, None if scale is None else scale.dtype, router)
    y = x.new_empty(x.shape, dtype=dtype_of(parsed.combine.out_dtype, x.dtype))
    return y, x.new_empty(size, dtype=torch.int64), x.new_empty(size, dtype=kind)


@torch.library.custom_op("moe_fx::moe_backward", mutates_args=())
def moe_backward(
    grad: Tensor,
    grad_weights: Tensor,
    x: Tensor,
    router_logits: Tensor,
    ids: Tensor,
    weights: Tensor,
    operands: list[Tensor],
    needs: list[bool],
    spec: str,
    binding: str,
    plan: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    _, router, experts_binding, roles = _read(spec, binding)
    mine, bias, scale = _split(list(operands), roles)
    dx, dweights, doperands = torch.ops.moe_fx.experts_backward(
        grad, x, ids, weights, mine, needs[: len(mine)], spec, experts_binding, plan
    )
    with torch._C._DisableAutocast():
        dlogits, dscale = route_backward(dweights + grad_weights, router_logits, ids, bias, scale, router)
    for role, operand, need in zip(roles, operands[len(mine) :], needs[len(mine) :], strict=True):
        d = dscale if role == "expert_scale" else torch.zeros_like(operand)
        doperands.append(operand.new_empty(0) if d is None or not need else d)
    return dx, dlogits, doperands


@moe_backward.register_fake
def _moe_backward_fake(
    grad: Tensor,
    grad_weights: Tensor,
    x: Tensor,
    router_logits: Tensor,
    ids: Tensor,
    weights: Tensor,
    operands: list[Tensor],
    needs: list[bool],
    spec: str,
    binding: str,
    plan: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    contiguous = torch.contiguous_format
    doperands = [
        torch.empty_like(o, memory_format=contiguous) if need else o.new_empty(0)
        for o, need in zip(operands, needs, strict=True)
    ]
    dlogits = torch.empty_like(router_logits, memory_format=contiguous)
    return torch.empty_like(x, memory_format=contiguous), dlogits, doperands


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, logits, operands, *attrs = inputs
    _, ids, weights = output
    roles = _read(attrs[0], attrs[1])[-1]
    chooses = [role == "router_bias" for role in roles]  # the choice has no derivative
    chooses = [False] * (len(operands) - len(roles)) + chooses
    ctx.attrs = tuple(attrs)
    ctx.needs = [o.requires_grad and not only for o, only in zip(operands, chooses, strict=True)]
    ctx.mark_non_differentiable(ids)
    ctx.save_for_backward(x, logits, ids, weights, *operands)


def _backward(ctx: Any, grad: Tensor, _: object, grad_weights: Tensor) -> tuple[Any, ...]:
    x, logits, ids, weights, *operands = ctx.saved_tensors
    dx, dlogits, doperands = torch.ops.moe_fx.moe_backward(
        grad, grad_weights, x, logits, ids, weights, operands, ctx.needs, *ctx.attrs
    )
    wanted = [g if need else None for g, need in zip(doperands, ctx.needs, strict=True)]
    return dx, dlogits, wanted, None, None, None


moe.register_autograd(_backward, setup_context=_setup_context)
moe_backward.register_autograd(ops._no_second_derivative, setup_context=lambda ctx, inputs, output: None)
