"""A handful of rows: copy the weights that each row needs and multiply in one batch.  No sort, no host synchronisation.

Meant for a GPU that decodes one token, and for experts so small that launches and synchronisations cost more than the
copy.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moe_fx.binding import Experts, Matrices
from moe_fx.kernels.capability import PLAIN, Open
from moe_fx.kernels.experts.reference import ALL
from moe_fx.kernels.experts.rows import INDICES, SortedRows, activate, empty_result, finish, gather_rows, inside, room
from moe_fx.kernels.experts.torch_experts import Scratch, TorchExperts
from moe_fx.kernels.modular_kernel.experts import Shape
from moe_fx.kernels.modular_kernel.formats import ExpertTokensMetadata
from moe_fx.kernels.registry import Cost, experts_kernel
from moe_fx.reference.experts import compute_dtype, normalise
from moe_fx.spec import MoESpec

CHUNK = 32  # rows whose weights are copied at a time: bounds the memory


@experts_kernel(
    "gather_bmm",
    capability=replace(
        ALL,
        forms=frozenset({"stacked", "flat"}),
        schemes=frozenset({PLAIN}),
        backward="recompute",
        captures=Open(),
    ),
    cost=Cost("per_row", lambda E, T, k: 20 + T * k / 4, ((1, 0.007),)),
    rank=40,
)
class GatherBmmExperts(TorchExperts):
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
        return (M * topk, K), (0,), (M, K)

    def temporary_shapes(self, M: int, N: int, K: int, topk: int, activation: str) -> tuple[Shape, ...]:
        """The copied weights of a chunk's rows, of one product at a time, and indices."""
        return (min(M * topk, CHUNK), N, K), (M * topk, INDICES)

    def compute(
        self, x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, spec: MoESpec, scratch: Scratch
    ) -> Tensor:
        if not ids.numel():
            return empty_result(x, spec, scratch.result)
        valid = inside(ids, spec.expert.experts)
        expert = ids.where(valid, 0).reshape(-1)
        flat = torch.arange(ids.numel(), device=ids.device)
        dtype = compute_dtype(experts, spec.expert)
        out = room(scratch.first, (ids.numel(), x.shape[1]), dtype, x)
        for rows, es, place in zip(flat.split(CHUNK), expert.split(CHUNK), out.split(CHUNK), strict=True):
            place.copy_(_rows(gather_rows(x, weights, rows, spec, dtype), es, experts, spec))
        out.masked_fill_(~valid.reshape(-1, 1), 0)
        weights = weights.masked_fill(~valid, 0)
        return finish(out, SortedRows(flat, [], 0), weights, spec, x.dtype, scratch.result)


def _rows(inputs: Tensor, expert: Tensor, experts: Experts, spec: MoESpec) -> Tensor:
    """inputs [n, H], each through its own expert [n] → [n, H]."""
    up = [_product(inputs, matrices, expert) for matrices in experts.up]
    for result, biases in zip(up, experts.up_bias, strict=False):
        result += _pick(biases, expert, result.dtype)
    out = _product(activate(up, experts, spec.expert), experts.down, expert)
    if experts.down_bias is not None:
        out += _pick(experts.down_bias, expert, out.dtype)
    return normalise(out, experts.norm, spec.expert)


def _product(inputs: Tensor, matrices: Matrices, expert: Tensor) -> Tensor:
    return torch.bmm(_pick(matrices, expert, inputs.dtype), inputs.unsqueeze(2)).squeeze(2)


def _pick(stacked: Matrices, expert: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrices or vectors of each row's expert, copied in the order in which they lie in memory."""
    assert isinstance(stacked, Tensor)
    if stacked.dim() == 3 and stacked.stride(2) != 1:
        return stacked.transpose(1, 2).index_select(0, expert).to(dtype).transpose(1, 2)
    return stacked.index_select(0, expert).to(dtype)
