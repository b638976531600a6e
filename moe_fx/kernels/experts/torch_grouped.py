"""PyTorch's own grouped GEMM over rows sorted by expert: bf16, stacked weights, no host synchronisation on a GPU.

x, ids → rows by expert and the end of each expert's rows → two grouped products → y.
The rows after the last end (ids outside [0, E)) are left undefined by grouped_mm and cleared here.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_fx.binding import Experts, Matrices, Vectors
from moe_fx.kernels.capability import PLAIN
from moe_fx.kernels.experts.reference import ALL
from moe_fx.kernels.experts.rows import SortedRows, activate, by_expert, empty_result, finish, gather_rows, inside
from moe_fx.kernels.experts.torch_experts import Scratch, TorchExperts
from moe_fx.kernels.registry import Cost, experts_kernel
from moe_fx.reasons import MoEFxRuntimeError
from moe_fx.reference.experts import normalise
from moe_fx.spec import MoESpec

CAPABILITY = replace(
    ALL,
    devices=frozenset({"cpu", "cuda"}),
    dtypes=frozenset({"bfloat16"}),
    forms=frozenset({"stacked", "flat"}),
    compute_dtypes=frozenset({"", "bfloat16"}),
    packages=frozenset({"torch.grouped_mm"}),
    schemes=frozenset({PLAIN}),
    size_multiple=8,  # grouped_mm wants strides of 16 bytes, 8 elements of bfloat16
)


@experts_kernel(
    "torch_grouped",
    capability=CAPABILITY,
    cost=Cost("active", lambda E, T, k: 24, ((1, 0.04), (2, 0.055), (8, 0.17), (32, 0.43), (128, 0.66), (512, 0.7))),
    rank=10,
)
class TorchGroupedExperts(TorchExperts):
    """Raises MoEFxRuntimeError if a weight does not step (on a GPU: start) at multiples of 16 bytes."""

    def compute(
        self, x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, spec: MoESpec, scratch: Scratch
    ) -> Tensor:
        if not ids.numel():
            if self.keep is not None:
                self.keep += [x.new_empty((0, matrices[0].shape[0]), dtype=torch.bfloat16) for matrices in experts.up]
            return empty_result(x, spec)
        count = spec.expert.experts
        valid = inside(ids, count)
        sorted_ = by_expert(ids.where(valid, count), count)
        key, order, ends = sorted_.expert, sorted_.order, sorted_.ends
        expert = key.clamp(max=count - 1)  # of each row, for its biases
        inputs = gather_rows(x, weights, order, spec, torch.bfloat16)
        up = [_product(inputs, matrices, ends) for matrices in experts.up]
        for result, biases in zip(up, experts.up_bias, strict=False):
            result += _bias_rows(biases, expert, result)
        if self.keep is not None:
            self.keep += up
        out = _product(activate(up, experts, spec.expert), experts.down, ends)
        if experts.down_bias is not None:
            out += _bias_rows(experts.down_bias, expert, out)
        if spec.expert.norm:
            out = normalise(out, experts.norm, spec.expert)
        # Asking whether there is such a row would wait for a GPU; on a CPU it is cheaper than the pass.
        if out.is_cuda or not bool(valid.all()):
            out.masked_fill_((key == count).unsqueeze(1), 0)
            weights = weights.masked_fill(~valid, 0)
        return finish(out, SortedRows(order, [], 0), weights, spec, x.dtype)


def _product(inputs: Tensor, matrices: Matrices, ends: Tensor) -> Tensor:
    """inputs [S, in] by expert, matrices [E, out, in] → [S, out]; rows from ends[-1] on are undefined."""
    assert isinstance(matrices, Tensor)
    row = max(matrices.stride(1), matrices.stride(2))
    unaligned = matrices.is_cuda and matrices.data_ptr() % 16  # a CPU takes any address (memory-mapped checkpoints)
    if unaligned or row % 8 or matrices.stride(0) % 8 or 1 not in matrices.stride()[1:]:
        raise MoEFxRuntimeError(
            "kernel 'torch_grouped' needs weights that start and step at multiples of 16 bytes; these have strides "
            f"{tuple(matrices.stride())} at address {matrices.data_ptr():#x}: use layout='stacked' or another kernel"
        )
    return F.grouped_mm(inputs, matrices.transpose(1, 2), offs=ends)


def _bias_rows(biases: Vectors, expert: Tensor, like: Tensor) -> Tensor:
    """The bias of each row's expert [S, out], in the dtype of ``like``."""
    assert isinstance(biases, Tensor)
    return biases.index_select(0, expert).to(like.dtype)
