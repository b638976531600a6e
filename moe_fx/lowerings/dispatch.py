"""RUN: the ops' implementation.

Parses the attributes once, binds the operands, and calls a FusedMoEKernel over the experts class of the plan's range
for this number of tokens: a choice on a host integer, no recompile, no device sync.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor

from moe_fx.binding import Experts, WeightBinding, bind, parse_binding
from moe_fx.kernels import routing
from moe_fx.kernels.build import build, run
from moe_fx.kernels.experts.torch_experts import TorchExperts
from moe_fx.kernels.registry import Kernel, kernel
from moe_fx.ops import Attributes, Call, contiguous_like, saved_like
from moe_fx.plan import Plan, parse_plan
from moe_fx.reasons import MoEFxError, MoEFxRuntimeError, out_of_memory
from moe_fx.reference.router import route as reference_route
from moe_fx.spec import MoESpec, RouterSpec, parse
from moe_fx.weights import STORE


@lru_cache(maxsize=4096)
def _parsed(attrs: Attributes) -> tuple[MoESpec, WeightBinding, Plan, tuple[Kernel, ...]]:
    try:
        spec, binding, plan = parse(attrs[0]), parse_binding(attrs[1]), parse_plan(attrs[2])
        kernels = tuple(kernel(r.kernel) for r in plan.ranges)
    except (KeyError, ValueError) as error:  # a graph saved by another version, or written by hand
        raise MoEFxRuntimeError(f"the attributes of moe_fx::experts cannot be read: {error}") from error
    for chosen in kernels:
        if chosen.experts.layout_for(spec) not in ("", plan.layout):
            raise MoEFxRuntimeError(f"{chosen.name!r} does not read layout {plan.layout!r}: compile the model anew")
    return spec, binding, plan, kernels


class Dispatch:
    """Runs ``moe_fx::experts`` and its backward with the kernels of the registry, and the router of ``moe_fx::moe``."""

    def forward(self, call: Call) -> Tensor:
        spec, _, plan, _ = _parsed(call.attrs)
        chosen = _kernel(call)
        experts = _experts(call, plan.layout)
        with _named(f"kernel {chosen.name!r}", call.x, spec):
            if chosen.capability.monolithic:
                return _whole(call, chosen, experts, spec)
            return run(chosen, call.x, call.ids, call.weights, experts, spec, plan.workspace_bytes)

    def train(self, call: Call) -> tuple[Tensor, list[Tensor]]:
        spec, _, plan, _ = _parsed(call.attrs)
        if plan.backward == "recompute":
            return self.forward(call), []
        chosen = _kernel(call)
        saved: list[Tensor] = []
        with _named(f"kernel {chosen.name!r}", call.x, spec):
            experts = _experts(call, plan.layout)
            y = run(chosen, call.x, call.ids, call.weights, experts, spec, plan.workspace_bytes, keep=saved)
        return y, saved if call.x.shape[0] else saved_like(call)  # no tokens: no kernel ran

    def backward(
        self, call: Call, grad: Tensor, saved: list[Tensor], needs: list[bool]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        spec, binding, _, _ = _parsed(call.attrs)
        # a gradient that nobody wants is bound on meta, where nothing is written
        grads = [
            contiguous_like(o) if need else torch.empty_like(o, device="meta")
            for o, need in zip(call.operands, needs, strict=True)
        ]
        views = bind(binding, grads, spec.expert.experts) if any(needs) else None
        with _named("the backward", call.x, spec):
            experts = _experts(call, "view")
            kernel_of_forward = _kernel(call).experts
            assert issubclass(kernel_of_forward, TorchExperts)  # the oracle vetoes others where gradients are wanted
            dx, dweights = kernel_of_forward.differentiate(
                grad, call.x, call.ids, call.weights, experts, spec, views, saved
            )
        wanted = zip(grads, call.operands, needs, strict=True)
        return dx, dweights, [g if need else o.new_empty(0) for g, o, need in wanted]

    def route(
        self, logits: Tensor, bias: Tensor | None, expert_scale: Tensor | None, spec: RouterSpec, top_k: int
    ) -> tuple[Tensor, Tensor]:
        """By the kernel where it runs and serves the router, else as the reference does."""
        given = (logits, bias, expert_scale, spec, top_k)
        with _named("the router's kernel", logits, spec):
            found = routing.route(*given)
        return reference_route(*given) if found is None else found


def _whole(call: Call, chosen: Kernel, experts: Experts, spec: MoESpec) -> Tensor:
    """Router and experts in one kernel, from the logits."""
    if call.logits is None:
        raise MoEFxRuntimeError(f"kernel {chosen.name!r} contains the router, and moe_fx::experts has no logits")
    built = build(chosen, spec, experts, call.x.dtype, expert_scale=call.expert_scale)
    activation = built.experts.moe_config.activation
    return built.apply_monolithic(
        call.x, experts.up, experts.down, call.logits, activation, e_score_correction_bias=call.router_bias
    )


def _kernel(call: Call) -> Kernel:
    """The kernel of the plan's range for this number of tokens."""
    _, _, plan, kernels = _parsed(call.attrs)
    tokens = call.x.shape[0]
    return next(k for k, r in zip(kernels, plan.ranges, strict=True) if r.t_max is None or tokens <= r.t_max)


def _experts(call: Call, layout: str) -> Experts:
    spec, binding, _, _ = _parsed(call.attrs)
    return STORE.get(layout, binding, call.operands, spec.expert.experts, spec.quant)


@contextmanager
def _named(what: str, rows: Tensor, spec: object) -> Iterator[None]:
    """Whatever fails inside becomes an error of ours that says what ran on what.  Inside, the device of ``rows`` is the
    current one: device code is launched there."""
    try:
        with _on_device(rows):
            yield
    except MoEFxError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise  # as torch says it: callers free memory and try again
        raise MoEFxRuntimeError(f"{what} failed on {rows.shape[0]} tokens of {spec}: {error}") from error


def _on_device(rows: Tensor) -> AbstractContextManager[object]:
    """A fake tensor may say that it is on a device which this torch does not know."""
    known = rows.is_cuda and torch.backends.cuda.is_built()
    return torch.cuda.device_of(rows) if known else nullcontext()
