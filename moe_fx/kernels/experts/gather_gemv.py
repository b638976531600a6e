"""A handful of rows, each times its own expert's matrices where they lie: written for a compiler.

Under Inductor the gather, the product and the sum are one loop that reads every weight once, at the speed of memory,
and needs no sort, no copy and no call per expert.  It therefore goes into the graph itself, in the place of the op,
where the number of tokens is known (``Plan.inline``).  Run eagerly it is right and slow: it copies the weights.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moe_fx.binding import Experts, Matrices
from moe_fx.kernels.capability import PLAIN, Open
from moe_fx.kernels.experts.reference import ALL
from moe_fx.kernels.experts.rows import activate, inside
from moe_fx.kernels.experts.torch_experts import Scratch, TorchExperts
from moe_fx.kernels.registry import Cost, experts_kernel
from moe_fx.reference.experts import compute_dtype, dtype_of, normalise
from moe_fx.spec import MoESpec

CAPABILITY = replace(
    ALL,
    devices=frozenset({"cpu"}),  # others: not measured yet
    forms=frozenset({"stacked", "flat"}),
    transposed=frozenset({False}),  # down columns Inductor's loop is slower than the copy
    schemes=frozenset({PLAIN}),
    backward="",
    compiled=True,
    captures=Open(),
)


@experts_kernel(
    "gather_gemv",
    capability=CAPABILITY,
    cost=Cost("gathered", lambda E, T, k: 4, ((1, 0.25),)),
    rank=30,
)
class GatherGemvExperts(TorchExperts):
    """Functional: a graph is made of it."""

    def compute(
        self, x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, spec: MoESpec, scratch: Scratch
    ) -> Tensor:
        valid = inside(ids, spec.expert.experts)
        expert = ids.where(valid, 0)
        weights = weights.where(valid, 0)
        dtype = compute_dtype(experts, spec.expert)
        on_input = spec.combine.weight_on == "input"
        rows = x.unsqueeze(1).expand(*ids.shape, x.shape[1])
        rows = (rows * weights.unsqueeze(2) if on_input else rows).to(dtype)
        up = [_product(rows, matrices, expert) for matrices in experts.up]
        for i, biases in enumerate(experts.up_bias):
            up[i] = up[i] + _pick(biases, expert).to(dtype)
        out = _product(activate(up, experts, spec.expert), experts.down, expert)
        if experts.down_bias is not None:
            out = out + _pick(experts.down_bias, expert).to(dtype)
        out = normalise(out, experts.norm, spec.expert).where(valid.unsqueeze(2), 0)
        wide = torch.promote_types(dtype_of(spec.combine.accumulate, x.dtype), torch.float32)
        if not on_input:
            wide = torch.promote_types(wide, weights.dtype)
            out = out.to(wide) * weights.to(wide).unsqueeze(2)
        return out.sum(1, dtype=wide).to(dtype_of(spec.combine.out_dtype, x.dtype))


def _product(rows: Tensor, matrices: Matrices, expert: Tensor) -> Tensor:
    """rows [T, k, in], each times the matrix of its own expert [T, k] → [T, k, out]; sums in float32 or wider."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    return (_pick(matrices, expert).to(wide) * rows.to(wide).unsqueeze(2)).sum(-1).to(rows.dtype)


def _pick(stacked: Matrices, expert: Tensor) -> Tensor:
    assert isinstance(stacked, Tensor)
    return stacked[expert]
