"""RUN: the ops' implementation.

Parses the attributes once, binds the operands, and takes the kernel of the plan's range for this number of tokens: a
choice on a host integer, no recompile, no device sync.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from moe_fx.binding import Experts, WeightBinding, bind, parse_binding
from moe_fx.kernels.experts.backward import experts_backward
from moe_fx.kernels.registry import Kernel, kernel
from moe_fx.ops import Attributes
from moe_fx.plan import Plan, parse_plan
from moe_fx.reasons import MoEFxError, MoEFxRuntimeError
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

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, operands: list[Tensor], attrs: Attributes) -> Tensor:
        spec, binding, plan, kernels = _parsed(attrs)
        tokens = x.shape[0]
        chosen = next(k for k, r in zip(kernels, plan.ranges, strict=True) if r.t_max is None or tokens <= r.t_max)
        try:
            experts = self._experts(plan, binding, operands, spec)
            return chosen.forward(x, ids, weights, experts, spec)
        except MoEFxError:
            raise
        except Exception as error:
            raise MoEFxRuntimeError(f"kernel {chosen.name!r} failed on {tokens} tokens of {spec}: {error}") from error

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
        spec, binding, _, _ = _parsed(attrs)
        e = spec.expert.experts
        grads = [torch.empty_like(o, memory_format=torch.contiguous_format) for o in operands] if any(needs) else None
        views = None if grads is None else bind(binding, grads, e)
        try:
            dx, dweights = experts_backward(grad, x, ids, weights, bind(binding, operands, e), spec, views)
        except Exception as error:
            raise MoEFxRuntimeError(f"the backward of {spec} failed on {x.shape[0]} tokens: {error}") from error
        if grads is None:
            return dx, dweights, [o.new_empty(0) for o in operands]
        return dx, dweights, [g if need else g.new_empty(0) for g, need in zip(grads, needs, strict=True)]

    @staticmethod
    def _experts(plan: Plan, binding: WeightBinding, operands: list[Tensor], spec: MoESpec) -> Experts:
        if plan.layout == "view":
            return bind(binding, operands, spec.expert.experts)
        return STORE.get(plan.layout, binding, operands, spec.expert.experts)
