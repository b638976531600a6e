"""The ops that stand in a rewritten graph: schema, fake, autograd, and one slot that lowerings fills.

``experts(x, topk_ids, topk_weights, operands, spec, binding, plan) -> y``
    x [T, H] floating; topk_ids [T, k] integer, an id outside [0, E) adds nothing and reads nothing; topk_weights [T, k]
    floating; operands: the model's own tensors in the order of roles that ``binding`` names.  y [T, H].
``experts_inline(the same) -> y``
    The same again, for a compiler: ``lowerings.inline`` puts it where the plan's inline kernel stands in the graph.
``experts_train(the same) -> (y, saved)``
    What ``experts`` becomes where a gradient is wanted.  saved: the results of the up products [T * k, ·] in order of
    expert, rows of ids outside [0, E) last and undefined; nothing where the plan recomputes them in the backward.
``experts_backward(grad, x, topk_ids, topk_weights, operands, saved, needs, spec, binding, plan)``
    ``-> (dx, dweights, doperands)``; needs: for every operand, whether its gradient is wanted; a frozen operand gets an
    empty tensor and costs nothing.

The strings carry all that running needs, so an op works the same after a cache hit, export, AOTInductor or CUDA-graph
replay.  The ops are opaque to autocast: casts were part of the block that they replace and are in the spec.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from moe_fx.binding import WeightBinding, bind, parse_binding
from moe_fx.plan import Plan, parse_plan
from moe_fx.reasons import MoEFxRuntimeError, MoEFxUnsupportedError
from moe_fx.reference import experts_backward as reference_backward
from moe_fx.reference import experts_forward as reference_forward
from moe_fx.reference.experts import compute_dtype, dtype_of
from moe_fx.reference.router import route as reference_route
from moe_fx.spec import MoESpec, RouterSpec, parse

Attributes = tuple[str, ...]  # spec, binding, plan


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of ``experts``; see the module's text.  logits [T, E], router_bias and expert_scale [E]: what ids
    and weights came from, where the router is part of the op."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    operands: list[Tensor]
    attrs: Attributes
    logits: Tensor | None = None
    router_bias: Tensor | None = None
    expert_scale: Tensor | None = None


class Implementation(Protocol):
    """What runs the ops: ``lowerings.dispatch`` in production, the reference where nothing was installed."""

    def forward(self, call: Call) -> Tensor: ...

    def train(self, call: Call) -> tuple[Tensor, list[Tensor]]: ...

    def backward(
        self, call: Call, grad: Tensor, saved: list[Tensor], needs: list[bool]
    ) -> tuple[Tensor, Tensor, list[Tensor]]: ...

    def route(
        self, logits: Tensor, bias: Tensor | None, expert_scale: Tensor | None, spec: RouterSpec, top_k: int
    ) -> tuple[Tensor, Tensor]:
        """As ``reference.router.route``."""
        ...


class ReferenceImplementation:
    """Runs the definition itself."""

    def forward(self, call: Call) -> Tensor:
        spec, binding, _, _ = _read(*call.attrs)
        return reference_forward(
            call.x, call.ids, call.weights, bind(binding, call.operands, spec.expert.experts, spec.quant), spec
        )

    def train(self, call: Call) -> tuple[Tensor, list[Tensor]]:
        return self.forward(call), [s.zero_() for s in saved_like(call)]

    def backward(
        self, call: Call, grad: Tensor, saved: list[Tensor], needs: list[bool]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        spec, binding, _, _ = _read(*call.attrs)
        grads = [torch.zeros_like(o, memory_format=torch.contiguous_format) for o in call.operands]
        experts, dexperts = (bind(binding, tensors, spec.expert.experts) for tensors in (call.operands, grads))
        dx, dweights = reference_backward(grad, call.x, call.ids, call.weights, experts, spec, dexperts)
        return dx, dweights, [g if need else g.new_empty(0) for g, need in zip(grads, needs, strict=True)]

    route = staticmethod(reference_route)


_implementation: Implementation = ReferenceImplementation()


def install(implementation: Implementation) -> None:
    """Fills the slot: from now on every call of the ops, compiled earlier or later, runs ``implementation``."""
    global _implementation
    _implementation = implementation


@lru_cache(maxsize=4096)
def _read(spec: str, binding: str, plan: str) -> tuple[MoESpec, WeightBinding, Plan, int]:
    """The attributes, and how many operands they ask for; another version may have written them."""
    try:
        parsed, bound, chosen = parse(spec), parse_binding(binding), parse_plan(plan)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise MoEFxRuntimeError(f"a fused op has attributes that cannot be read: {error}") from error
    return parsed, bound, chosen, sum(o.count(parsed.expert.experts) for o in bound.operands)


def saved_like(call: Call) -> list[Tensor]:
    """Empty tensors of the sizes and dtypes of what ``experts_train`` saves."""
    spec, binding, plan, _ = _read(*call.attrs)
    if plan.backward == "recompute":
        return []
    experts = bind(binding, call.operands, spec.expert.experts, spec.quant)
    rows, dtype = call.x.shape[0] * spec.top_k, compute_dtype(experts, spec.expert, call.x.dtype)
    return [call.x.new_empty((rows, matrices[0].shape[0]), dtype=dtype) for matrices in experts.up]


def _differ(size: object, wanted: object) -> bool:
    """For certain, without a guard on a symbolic size."""
    return isinstance(size, int) and isinstance(wanted, int) and size != wanted


def _check(call: Call) -> None:
    """A named error instead of a wrong read."""
    spec, binding, _, count = _read(*call.attrs)
    x, ids, weights, operands = call.x, call.ids, call.weights, call.operands
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
        position += operand.count(spec.expert.experts)
        if operand.form == "stacked" and operand.role != "norm" and _differ(sizes[0], spec.expert.experts):
            raise MoEFxRuntimeError(f"{operand.role} {list(sizes)} must hold {spec.expert.experts} experts")


_NO_TRANSFORM = (
    "the ops of moe_fx have no forward-mode derivative and no torch.func transform (vmap, jvp, grad); compile the part "
    "that needs one with another backend, or set MOE_FX_DISABLE=1"
)


def refuse_forward_mode(*tensors: Tensor) -> None:
    """Below autograd a tangent would be dropped in silence."""
    if forward_ad._current_level < 0:
        return
    with forward_ad._set_fwd_grad_enabled(True):
        if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            raise MoEFxUnsupportedError(_NO_TRANSFORM)


def no_second_derivative(ctx: Any, *grads: object) -> None:
    raise MoEFxRuntimeError(
        "the ops of moe_fx have no second derivative; compile the part that needs one with another backend, "
        "or set MOE_FX_DISABLE=1"
    )


def _no_transform(*_: object) -> None:
    raise MoEFxUnsupportedError(_NO_TRANSFORM)


_LIBRARY = torch.library.Library("moe_fx", "FRAGMENT")  # held: its registrations live as long as it does


def define(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """An op of ours that is not differentiable yet: schema, what it runs below autograd and autocast, and its fake."""

    def below(*args: Any) -> Any:
        with torch._C._DisableAutocast():
            return run(*args)

    # A CUDA graph may hold them: where one is asked for, the plan has no kernel that waits (``veto.capture``).
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, below, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, _no_transform, "FuncTorchDynamicLayerFrontMode")
    torch.library.register_fake(f"moe_fx::{name}", fake, lib=_LIBRARY)


def define_choice(name: str, train: str, differentiable: Callable[..., list[Tensor]]) -> None:
    """Where a gradient of ``differentiable(*args)`` is wanted, op ``name`` is op ``train`` without what that saves."""

    def choose(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(t.requires_grad for t in differentiable(*args)):
            *results, _ = getattr(torch.ops.moe_fx, train)(*args)
            return results[0] if len(results) == 1 else tuple(results)
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.moe_fx, name)(*args)

    _LIBRARY.impl(name, choose, "Autograd")


def define_derivative(name: str, backward: Callable[..., Any], save: Callable[..., None] = lambda *_: None) -> None:
    """The derivative of an op; save(ctx, inputs, output) keeps what ``backward(ctx, *grads)`` reads."""

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # torch passes them by name
        save(ctx, inputs, output)

    torch.library.register_autograd(f"moe_fx::{name}", backward, setup_context=keep, lib=_LIBRARY)


def contiguous_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def gradients_like(operands: list[Tensor], needs: list[bool]) -> list[Tensor]:
    """Empty tensors for the gradients of the operands: of no elements where none is wanted."""
    return [contiguous_like(o) if need else o.new_empty(0) for o, need in zip(operands, needs, strict=True)]


def call_of(x: Tensor, ids: Tensor, weights: Tensor, operands: list[Tensor], *attrs: str) -> Call:
    """The arguments of an op, ids as kernels take them: int32 or int64."""
    narrow = not ids.dtype.is_floating_point and ids.dtype not in (torch.int32, torch.int64)
    return Call(x, ids.long() if narrow else ids, weights, list(operands), attrs)


def _experts(*args: Any) -> Tensor:
    return run(call_of(*args))


def run(call: Call) -> Tensor:
    """What ``experts`` gives, below autograd."""
    _check(call)
    refuse_forward_mode(call.x, call.weights, *call.operands)
    return _implementation.forward(call)


def route(
    logits: Tensor, bias: Tensor | None, expert_scale: Tensor | None, spec: RouterSpec, top_k: int
) -> tuple[Tensor, Tensor]:
    """``reference.router.route``, by what runs the ops."""
    return _implementation.route(logits, bias, expert_scale, spec, top_k)


def _experts_fake(*args: Any) -> Tensor:
    call = call_of(*args)
    _check(call)
    return call.x.new_empty(call.x.shape, dtype=dtype_of(parse(call.attrs[0]).combine.out_dtype, call.x.dtype))


def _train(*args: Any) -> tuple[Tensor, list[Tensor]]:
    call = call_of(*args)
    _check(call)
    refuse_forward_mode(call.x, call.weights, *call.operands)
    return _implementation.train(call)


def _train_fake(*args: Any) -> tuple[Tensor, list[Tensor]]:
    return _experts_fake(*args), saved_like(call_of(*args))


def _backward(grad: Tensor, *rest: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    *inputs, saved, needs, spec, binding, plan = rest
    return _implementation.backward(call_of(*inputs, spec, binding, plan), grad, list(saved), list(needs))


def _backward_fake(grad: Tensor, *rest: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    x, _, weights, operands, _, needs, *_ = rest
    return contiguous_like(x), contiguous_like(weights), gradients_like(operands, needs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    x, ids, weights, operands, *attrs = inputs
    _, saved = output
    ctx.attrs, ctx.needs, ctx.count = attrs, [o.requires_grad for o in operands], len(operands)
    ctx.set_materialize_grads(False)  # of ``saved``, which nobody reads
    ctx.save_for_backward(x, ids, weights, *operands, *saved)


def _differentiate(ctx: Any, grad: Tensor | None, _: object) -> tuple[Any, ...]:
    if grad is None:
        return None, None, None, [None] * ctx.count, None, None, None
    x, ids, weights, *rest = ctx.saved_tensors
    operands, saved = rest[: ctx.count], rest[ctx.count :]
    dx, dweights, doperands = torch.ops.moe_fx.experts_backward(
        grad, x, ids, weights, operands, saved, ctx.needs, *ctx.attrs
    )
    wanted = [g if need else None for g, need in zip(doperands, ctx.needs, strict=True)]
    return dx, None, dweights, wanted, None, None, None


_INPUTS = "Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor[] operands"
_ATTRS = "str spec, str binding, str plan"
define("experts", f"({_INPUTS}, {_ATTRS}) -> Tensor", _experts, _experts_fake)
define("experts_inline", f"({_INPUTS}, {_ATTRS}) -> Tensor", _experts, _experts_fake)
define("experts_train", f"({_INPUTS}, {_ATTRS}) -> (Tensor, Tensor[])", _train, _train_fake)
define(
    "experts_backward",
    f"(Tensor grad, {_INPUTS}, Tensor[] saved, bool[] needs, {_ATTRS}) -> (Tensor, Tensor, Tensor[])",
    _backward,
    _backward_fake,
)
for _name in ("experts", "experts_inline"):
    define_choice(_name, "experts_train", lambda x, ids, weights, operands, *_: [x, weights, *operands])
define_derivative("experts_train", _differentiate, _save)
define_derivative("experts_backward", no_second_derivative)
