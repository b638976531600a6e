"""PyTorch's own grouped GEMM over rows sorted by expert: bf16, stacked weights, no host synchronisation on a GPU.

x, ids → rows by expert and the end of each expert's rows → two grouped products → y.
The rows after the last end (ids outside [0, E)) are left undefined by grouped_mm and cleared here.
Inputs lie in a workspace, as hidden values of more than one block do, and y in the output.  grouped_mm writes into no
tensor of ours: what the products give is allocated and counted as workspaces are, and so are the activation of a block
and the indices.  Nothing else grows with the number of tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_fx.binding import Experts, Matrices, Vectors
from moe_fx.kernels.capability import PLAIN
from moe_fx.kernels.experts.reference import ALL, GPU_EFFICIENCY, PASSES
from moe_fx.kernels.experts.rows import (
    INDICES,
    LAUNCH,
    SortedRows,
    activate,
    blocks,
    by_expert,
    empty_result,
    finish,
    gather_rows,
    inside,
    room,
    sizes_of,
)
from moe_fx.kernels.experts.torch_experts import Scratch, TorchExperts
from moe_fx.kernels.modular_kernel.experts import Shape
from moe_fx.kernels.modular_kernel.formats import ExpertTokensMetadata
from moe_fx.kernels.registry import Cost, experts_kernel
from moe_fx.reasons import MoEFxRuntimeError
from moe_fx.reference.experts import normalise
from moe_fx.spec import ExpertSpec, MoESpec

CAPABILITY = replace(
    ALL,
    devices=frozenset({"cpu", "cuda"}),
    dtypes=frozenset({"bfloat16"}),
    forms=frozenset({"stacked", "flat"}),
    compute_dtypes=frozenset({"", "bfloat16"}),
    packages=frozenset({"torch.grouped_mm"}),
    schemes=frozenset({PLAIN}),
    captures=frozenset({"sm90", "sm100", "sm103"}),  # elsewhere torch loops over the groups and reads their sizes
    size_multiple=8,  # grouped_mm wants strides of 16 bytes, 8 elements of bfloat16
)


# Without a grouped kernel torch waits for the sizes and multiplies expert by expert, those without rows too (pytorch
# PR 161407; 186620: it stays so).  Three launches an expert: two products and views; published decodes of 60 experts
# on what must be an A100 take 0.75 ms a layer more than with copied weights (docs-benchmarks/experts-backends).
LOOPED = Cost("active", lambda E, T, k: 24 + 3 * E, GPU_EFFICIENCY, passes=PASSES)


@experts_kernel(
    "torch_grouped",
    capability=CAPABILITY,
    cost=Cost(
        "active",
        lambda E, T, k: 24,
        ((1, 0.04), (2, 0.055), (8, 0.17), (32, 0.43), (128, 0.66), (512, 0.7)),
        # Products alone, of 989 TFLOP/s: 524 at 512 wide rows on an H100 (ao PR 2490), 569 at 1024 on an H200 (pytorch
        # issue 163425).  128 experts of one row each: a product of 2048 x 7168 takes 4.1 ms on an H200, a thousandth of
        # the peak (pytorch PR 156203).  Whole layers, with the passes: 242 at 2048 rows of Qwen3-30B-A3B, 181 at 640
        # narrower ones (VeOmni PR 460).
        on_gpu=((1, 0.001), (128, 0.13), (512, 0.48), (2048, 0.58)),
        on_archs=(("sm[78]?", LOOPED), ("sm1[12]?", LOOPED)),
        passes=PASSES,
    ),
    rank=10,
)
class TorchGroupedExperts(TorchExperts):
    """Raises MoEFxRuntimeError if a weight does not step (on a GPU: start) at multiples of 16 bytes."""

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: ExpertTokensMetadata | None,
        activation: str,
    ) -> tuple[Shape, Shape, Shape]:
        return (M * topk, K), (M * topk, self.adjust_N_for_activation(N, activation)), (M, K)

    def temporary_shapes(self, M: int, N: int, K: int, topk: int, activation: str) -> tuple[Shape, ...]:
        """Results of the up products, the activation of a block or results of the down products, and indices."""
        return (M * topk, N), (max(min(M * topk, LAUNCH) * N, M * topk * K),), (M * topk, INDICES)

    def compute(
        self, x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, spec: MoESpec, scratch: Scratch
    ) -> Tensor:
        if not ids.numel():
            if self.keep is not None:
                self.keep += [x.new_empty((0, matrices[0].shape[0]), dtype=torch.bfloat16) for matrices in experts.up]
            return empty_result(x, spec, scratch.result)
        count, size = spec.expert.experts, ids.numel()
        valid = inside(ids, count)
        sorted_ = by_expert(ids.where(valid, count), count)
        key, order, ends = sorted_.expert, sorted_.order, sorted_.ends
        inputs = room(scratch.first, (size, x.shape[1]), torch.bfloat16, x)
        gather_rows(x, weights, order, spec, torch.bfloat16, inputs)
        up = [_product(inputs, matrices, ends) for matrices in experts.up]
        if self.keep is not None:
            self.keep += up
        for result, biases in zip(up, experts.up_bias, strict=False):
            _add_biases(result, biases, key)
        hidden = _hidden(up, experts, spec.expert, scratch.second)
        del up  # the sum takes as much on a device
        out = _product(hidden, experts.down, ends)
        if experts.down_bias is not None:
            _add_biases(out, experts.down_bias, key)
        if spec.expert.norm:
            for piece in blocks(out):
                piece.copy_(normalise(piece, experts.norm, spec.expert))
        # Asking whether there is such a row would wait for a GPU; on a CPU it is cheaper than the pass.
        if out.is_cuda or not bool(valid.all()):
            out.masked_fill_((key == count).unsqueeze(1), 0)
            weights = weights.masked_fill(~valid, 0)
        return finish(out, SortedRows(order, [], 0), weights, spec, x.dtype, scratch.result)


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


def _hidden(up: list[Tensor], experts: Experts, spec: ExpertSpec, scratch: Tensor) -> Tensor:
    """Results of the up products [S, ·] → hidden [S, I]: a block at a time, in ``scratch`` where there are several."""
    pieces = list(zip(*map(blocks, up), strict=True))
    if len(pieces) == 1:
        return activate(up, experts, spec)
    hidden = room(scratch, (len(up[0]), sizes_of(experts.down)[1]), up[0].dtype, up[0])
    for place, piece in zip(blocks(hidden), pieces, strict=True):
        place.copy_(activate(list(piece), experts, spec))
    return hidden


def _add_biases(rows: Tensor, biases: Vectors, key: Tensor) -> None:
    """To each of rows [S, out] the bias of its expert, any where it has none: key [S]."""
    assert isinstance(biases, Tensor)
    for piece, expert in zip(blocks(rows), blocks(key), strict=True):
        piece += biases.index_select(0, expert.clamp(max=len(biases) - 1)).to(rows.dtype)
