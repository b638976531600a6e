"""RUN: the ops' implementation.

Parses the attributes once, binds the operands, and takes the kernel of the plan's range for this number of tokens: a
choice on a host integer, no recompile, no device sync.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moe_fx.binding import Experts, WeightBinding, bind, parse_binding
from moe_fx.kernels.experts.backward import experts_backward
from moe_fx.kernels.registry import Kernel, kernel
from moe_fx.ops import Attributes, Call, contiguous_like
from moe_fx.plan import Plan, parse_plan
from moe_fx.reasons import MoEFxError, MoEFxRuntimeError, out_of_memory
from moe_fx.spec import MoESpec, parse
from moe_fx.weights import STORE


@lru_cache(maxsize=4096)
def _parsed(attrs: Attributes) -> tuple[MoESpec, WeightBinding, Plan, tuple[Kernel, ...]]:
    try:
        plan = parse_plan(attrs[2])
        return parse(attrs[0]), parse_binding(attrs[1]), plan, tuple(kernel(r.kernel) for r in plan.ranges)
    except (KeyError, ValueError) as error:  # a graph saved by another version, or written by hand
        raise MoEFxRuntimeError(f"the attributes of moe_fx::experts cannot be read: {error}") from error


class Dispatch:
    """Runs ``moe_fx::experts`` and its backward with the kernels of the registry."""

    def forward(self, call: Call) -> Tensor:
        spec, _, plan, _ = _parsed(call.attrs)
        chosen = _kernel(call)
        with _named(f"kernel {chosen.name!r}", call, spec):
            return chosen.forward(call.x, call.ids, call.weights, _experts(call, plan.layout), spec)

    def train(self, call: Call) -> tuple[Tensor, list[Tensor]]:
        spec, _, plan, _ = _parsed(call.attrs)
        if plan.backward == "recompute":
            return self.forward(call), []
        chosen = _kernel(call)
        forward: Any = chosen.forward
        saved: list[Tensor] = []
        with _named(f"kernel {chosen.name!r}", call, spec):
            return forward(call.x, call.ids, call.weights, _experts(call, plan.layout), spec, keep=saved), saved

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
        with _named("the backward", call, spec):
            experts = _experts(call, "view")
            dx, dweights = experts_backward(grad, call.x, call.ids, call.weights, experts, spec, views, saved)
        wanted = zip(grads, call.operands, needs, strict=True)
        return dx, dweights, [g if need else o.new_empty(0) for g, o, need in wanted]


def _kernel(call: Call) -> Kernel:
    """The kernel of the plan's range for this number of tokens."""
    _, _, plan, kernels = _parsed(call.attrs)
    tokens = call.x.shape[0]
    return next(k for k, r in zip(kernels, plan.ranges, strict=True) if r.t_max is None or tokens <= r.t_max)


def _experts(call: Call, layout: str) -> Experts:
    spec, binding, _, _ = _parsed(call.attrs)
    if layout == "view":
        return bind(binding, call.operands, spec.expert.experts)
    return STORE.get(layout, binding, call.operands, spec.expert.experts)


@contextmanager
def _named(what: str, call: Call, spec: MoESpec) -> Iterator[None]:
    """Whatever fails inside becomes an error of ours that says what ran on what."""
    try:
        yield
    except MoEFxError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise  # as torch says it: callers free memory and try again
        raise MoEFxRuntimeError(f"{what} failed on {call.x.shape[0]} tokens of {spec}: {error}") from error
