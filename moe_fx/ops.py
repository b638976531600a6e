"""The ops that stand in a rewritten graph: schema, fake, autograd, and one slot that lowerings fills.

``experts(x, topk_ids, topk_weights, operands, spec, binding, plan) -> y``
    x [T, H] floating; topk_ids [T, k] integer, an id outside [0, E) adds nothing and reads nothing; topk_weights [T, k]
    floating; operands: the model's own tensors in the order of roles that ``binding`` names.  y [T, H].
``experts_backward(grad, x, topk_ids, topk_weights, operands, needs, spec, binding, plan) -> (dx, dweights, doperands)``
    needs: for every operand, whether its gradient is wanted; a frozen operand gets an empty tensor and costs nothing.

The strings carry all that running needs, so an op works the same after a cache hit, export, AOTInductor or CUDA-graph
replay.  The op is opaque to autocast: casts were part of the block that it replaces and are in the spec.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from moe_fx.binding import WeightBinding, bind, parse_binding
from moe_fx.plan import parse_plan
from moe_fx.reasons import MoEFxRuntimeError, MoEFxUnsupportedError
from moe_fx.reference import experts_backward as reference_backward
from moe_fx.reference import experts_forward as reference_forward
from moe_fx.reference.experts import dtype_of
from moe_fx.spec import MoESpec, parse


class Implementation(Protocol):
    """What runs the ops: ``lowerings.dispatch`` in production, the reference where nothing was installed."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, operands: list[Tensor], attrs: Attributes) -> Tensor: ...

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        operands: list[Tensor],
        needs: list[bool],
        attrs: Attributes,
    ) -> tuple[Tensor, Tensor, list[Tensor]]: ...


Attributes = tuple[str, str, str]  # spec, binding, plan


class ReferenceImplementation:
    """Runs the definition itself."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, operands: list[Tensor], attrs: Attributes) -> Tensor:
        spec = parse(attrs[0])
        return reference_forward(x, ids, weights, bind(parse_binding(attrs[1]), operands, spec.expert.experts), spec)

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        operands: list[Tensor],
        needs: list[bool],
        attrs: Attributes,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        spec, binding = parse(attrs[0]), parse_binding(attrs[1])
        grads = [torch.zeros_like(o, memory_format=torch.contiguous_format) for o in operands]
        e = spec.expert.experts
        dx, dweights = reference_backward(
            grad, x, ids, weights, bind(binding, operands, e), spec, bind(binding, grads, e)
        )
        return dx, dweights, [g if need else g.new_empty(0) for g, need in zip(grads, needs, strict=True)]


_implementation: Implementation = ReferenceImplementation()


def install(implementation: Implementation) -> None:
    """Fills the slot: from now on every call of the ops, compiled earlier or later, runs ``implementation``."""
    global _implementation
    _implementation = implementation


@lru_cache(maxsize=4096)
def _read(spec: str, binding: str, plan: str) -> tuple[MoESpec, WeightBinding, int]:
    """The attributes, and how many operands they ask for; another version may have written them."""
    try:
        parse_plan(plan)
        parsed, bound = parse(spec), parse_binding(binding)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise MoEFxRuntimeError(f"a fused op has attributes that cannot be read: {error}") from error
    lists = sum(o.form == "list" and o.role != "norm" for o in bound.operands)
    return parsed, bound, len(bound.operands) + lists * (parsed.expert.experts - 1)


def _differ(size: object, wanted: object) -> bool:
    """For certain, without a guard on a symbolic size."""
    return isinstance(size, int) and isinstance(wanted, int) and size != wanted


def _check(x: Tensor, ids: Tensor, weights: Tensor, operands: list[Tensor], attrs: Attributes) -> None:
    """A named error instead of a wrong read."""
    spec, binding, count = _read(*attrs)
    hidden, k = spec.expert.hidden, spec.top_k
    if x.ndim != 2 or _differ(x.shape[1], hidden) or not x.dtype.is_floating_point:
        raise MoEFxRuntimeError(f"x must be [T, {hidden}] and floating, got {x.dtype} {list(x.shape)}")
    if ids.ndim != 2 or _differ(ids.shape[0], x.shape[0]) or _differ(ids.shape[1], k) or ids.dtype.is_floating_point:
        got = f"{ids.dtype} {list(ids.shape)}"
        raise MoEFxRuntimeError(f"topk_ids must be integers [T, {k}] with T = {x.shape[0]}, got {got}")
    if weights.ndim != 2 or any(map(_differ, weights.shape, ids.shape)):
        raise MoEFxRuntimeError(f"topk_weights {list(weights.shape)} must have the shape of topk_ids {list(ids.shape)}")
    if len(operands) != count:
        raise MoEFxRuntimeError(f"{len(operands)} operands for a binding of {count}: {binding}")
    position = 0
    for operand in binding.operands:
        sizes = operands[position].shape
        position += 1 if operand.form != "list" or operand.role == "norm" else spec.expert.experts
        if operand.form == "stacked" and operand.role != "norm" and _differ(sizes[0], spec.expert.experts):
            raise MoEFxRuntimeError(f"{operand.role} {list(sizes)} must hold {spec.expert.experts} experts")


def _refuse_forward_mode(tensors: list[Tensor]) -> None:
    """Below autograd a tangent would be dropped in silence."""
    if forward_ad._current_level < 0:
        return
    with forward_ad._set_fwd_grad_enabled(True):
        if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            raise MoEFxUnsupportedError(_NO_TRANSFORM)


_NO_TRANSFORM = (
    "moe_fx.experts has no forward-mode derivative and no torch.func transform (vmap, jvp, grad); compile the part "
    "that needs one with another backend, or set MOE_FX_DISABLE=1"
)


@torch.library.custom_op("moe_fx::experts", mutates_args=())
def experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    operands: list[Tensor],
    spec: str,
    binding: str,
    plan: str,
) -> Tensor:
    attrs = (spec, binding, plan)
    _check(x, topk_ids, topk_weights, operands, attrs)
    _refuse_forward_mode([x, topk_weights, *operands])
    with torch._C._DisableAutocast():
        return _implementation.forward(x, topk_ids, topk_weights, list(operands), attrs)


@experts.register_fake
def _experts_fake(
    x: Tensor, topk_ids: Tensor, topk_weights: Tensor, operands: list[Tensor], spec: str, binding: str, plan: str
) -> Tensor:
    _check(x, topk_ids, topk_weights, operands, (spec, binding, plan))
    return x.new_empty(x.shape, dtype=dtype_of(parse(spec).combine.out_dtype, x.dtype))


@torch.library.custom_op("moe_fx::experts_backward", mutates_args=())
def experts_backward(
    grad: Tensor,
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    operands: list[Tensor],
    needs: list[bool],
    spec: str,
    binding: str,
    plan: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    with torch._C._DisableAutocast():
        return _implementation.backward(
            grad, x, topk_ids, topk_weights, list(operands), list(needs), (spec, binding, plan)
        )


@experts_backward.register_fake
def _experts_backward_fake(
    grad: Tensor,
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
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
    return (
        torch.empty_like(x, memory_format=contiguous),
        torch.empty_like(topk_weights, memory_format=contiguous),
        doperands,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ids, weights, operands, *attrs = inputs
    ctx.attrs = tuple(attrs)
    ctx.needs = [o.requires_grad for o in operands]
    ctx.save_for_backward(x, ids, weights, *operands)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, ids, weights, *operands = ctx.saved_tensors
    dx, dweights, doperands = torch.ops.moe_fx.experts_backward(grad, x, ids, weights, operands, ctx.needs, *ctx.attrs)
    wanted = [g if need else None for g, need in zip(doperands, ctx.needs, strict=True)]
    return dx, None, dweights, wanted, None, None, None


experts.register_autograd(_backward, setup_context=_setup_context)


def _no_second_derivative(ctx: Any, *grads: object) -> None:
    raise MoEFxRuntimeError(
        "moe_fx.experts has no second derivative; compile the part that needs one with another backend, "
        "or set MOE_FX_DISABLE=1"
    )


experts_backward.register_autograd(_no_second_derivative, setup_context=lambda ctx, inputs, output: None)


def _no_transform(*_: object) -> None:
    raise MoEFxUnsupportedError(_NO_TRANSFORM)


_LIBRARY = torch.library.Library("moe_fx", "FRAGMENT")  # held: its registrations live as long as it does
for _name in ("experts", "experts_backward"):
    _LIBRARY.impl(_name, _no_transform, "FuncTorchDynamicLayerFrontMode")
