"""One pair of GEMMs per active expert over rows sorted by expert: any dtype, any storage, any spec, any quantisation.

x, ids → rows by expert → chunks of experts: up products, activation, down products → y.
Sorting costs one host synchronisation; there is no mask of T * E.  Plain weights are read in place; quantised ones are
dequantised one expert at a time, active experts only.  The inputs of a chunk lie where its results will.
Rows lie in the workspaces, y in the output.  Allocated besides: indices of the routed rows (their order, sorted by
PyTorch into new tensors), and what one chunk's activation or one block's sum takes, however many tokens there are.
"""

from __future__ import annotations

from torch import Tensor

from moe_fx.binding import Experts
from moe_fx.kernels.experts.codes import DEQUANTISE
from moe_fx.kernels.experts.reference import ALL, EFFICIENCY, GPU_EFFICIENCY, PASSES
from moe_fx.kernels.experts.rows import (
    CHUNK,
    INDICES,
    PIECE,
    activate,
    down_products,
    empty_result,
    finish,
    gather_rows,
    inside,
    room,
    rounded,
    sizes_of,
    sort_rows,
    up_products,
)
from moe_fx.kernels.experts.torch_experts import Scratch, TorchExperts
from moe_fx.kernels.modular_kernel.experts import Shape
from moe_fx.kernels.modular_kernel.formats import ExpertTokensMetadata
from moe_fx.kernels.registry import Cost, experts_kernel, touched
from moe_fx.reference.experts import compute_dtype, normalise
from moe_fx.spec import MoESpec


@experts_kernel(
    "sorted_loop",
    capability=ALL,
    cost=Cost(
        "active", lambda E, T, k: 18 + 4 * touched(E, T, k), EFFICIENCY, DEQUANTISE, GPU_EFFICIENCY, passes=PASSES
    ),
    rank=20,
)
class SortedLoopExperts(TorchExperts):
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
        return (M * topk, K), (min(M * topk, CHUNK + PIECE), N), (M, K)

    def temporary_shapes(self, M: int, N: int, K: int, topk: int, activation: str) -> tuple[Shape, ...]:
        """The activation of a chunk, and indices."""
        return (min(M * topk, CHUNK + PIECE), N), (M * topk, INDICES)

    def compute(
        self, x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, spec: MoESpec, scratch: Scratch
    ) -> Tensor:
        rows = sort_rows(ids, spec.expert.experts).pieces(PIECE)
        dtype = compute_dtype(experts, spec.expert, x.dtype)
        widths = [sizes_of(matrices)[0] for matrices in experts.up]
        kept = [x.new_empty((ids.numel(), width), dtype=dtype) for width in widths] if self.keep is not None else None
        if self.keep is not None:
            self.keep += kept or []
        if not rows.used:
            return empty_result(x, spec, scratch.result)
        out = room(scratch.first, (ids.numel(), x.shape[1]), dtype, x)
        for chunk in rows.chunks(CHUNK):
            first, last = chunk[0][1], chunk[-1][2]
            if kept is None:
                space = room(scratch.second, (last - first, sum(widths)), dtype, x)
                places = list(space.view(-1).split([(last - first) * width for width in widths]))
                places = [place.view(last - first, -1) for place in places]
            else:
                places = [k[first:last] for k in kept]
            inputs = gather_rows(x, weights, rows.order[first:last], spec, dtype, out[first:last])
            up = up_products(rounded(inputs, "a1", experts, spec, chunk), experts, chunk, places)
            hidden = rounded(activate(up, experts, spec.expert), "a2", experts, spec, chunk)
            result = down_products(hidden, experts, chunk, out[first:last])
            if spec.expert.norm:
                result.copy_(normalise(result, experts.norm, spec.expert))
        if rows.used < ids.numel():
            out[rows.used :].zero_()
            weights = weights.masked_fill(~inside(ids, spec.expert.experts), 0)
        return finish(out, rows, weights, spec, x.dtype, scratch.result)
