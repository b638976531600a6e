"""vLLM's CUTLASS products of float8 rows by expert: one scale a tensor, or one a token and output channel.

Not run: no GPU here.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from moe_fx.binding import Matrices
from moe_fx.hardware import library_file
from moe_fx.kernels.libraries.adapter import ByExpert, GroupedExperts, adapter, packed, scaled, scheme_of
from moe_fx.quant import FP8_CHANNEL
from moe_fx.reasons import MoEFxUnsupportedError
from moe_fx.spec import MoESpec

FEW = 64  # rows up to which the op computes the transposed product, and problem sizes come so


@lru_cache(maxsize=2)
def ops(namespace: Literal["_C", "_moe_C"], needed: str) -> Any:
    """vLLM's compiled ops of that namespace, loaded if they are not; MoEFxUnsupportedError where ``needed`` is none."""
    if not _has(namespace, needed):
        first = library_file("vllm")
        for path in sorted(first.parent.glob(f"{namespace}*.so")) if first else ():
            torch.ops.load_library(str(path))
    if not _has(namespace, needed):
        raise MoEFxUnsupportedError(f"vllm has no op {namespace}::{needed}: it is missing, or of another version")
    return getattr(torch.ops, namespace)


def _has(namespace: str, op: str) -> bool:
    return f"{namespace}::{op}" in torch._C._dispatch_get_all_op_names()


@adapter("vllm_cutlass", rank=16)
class VllmCutlassExperts(GroupedExperts):
    @classmethod
    def layout_for(cls, spec: MoESpec) -> str:
        return packed("vllm_cutlass", scheme_of(spec))

    def supports_chunking(self) -> bool:
        """A dynamic scale of all tokens is not that of a part of them."""
        key = self.spec.quant.key("a1")
        return super().supports_chunking() and (key is None or key.static or key.group.row == 1)

    def products(self, rows: Tensor, matrices: Matrices, operand: Literal["a1", "a2"], sorted_: ByExpert) -> Tensor:
        library = ops("_C", "cutlass_moe_mm")
        codes, scale = self.rounded(rows, operand)
        weights, weights_scale = scaled(matrices)
        _, n, k = weights.shape
        starts = torch.cat([sorted_.ends.new_zeros(1), sorted_.ends]).long()
        sizes = [torch.empty(len(weights), 3, dtype=torch.int32, device=rows.device) for _ in range(2)]
        # the second ones are those of a down product [out = n, in = k]; the first are not used
        library.get_cutlass_moe_mm_problem_sizes_from_expert_offsets(starts, *sizes, k, n, len(rows) <= FEW)
        out = rows.new_empty(len(rows), n)
        by_token = self.spec.quant.key("w13") == FP8_CHANNEL
        library.cutlass_moe_mm(*arguments(out, (codes, scale), (weights, weights_scale), starts, sizes[1], by_token))
        return out


Pair = tuple[Tensor, Tensor]


def arguments(out: Tensor, a: Pair, b: Pair, starts: Tensor, sizes: Tensor, by_token: bool) -> tuple[Any, ...]:
    """Of ``_C::cutlass_moe_mm``: out [S, n]; a [S, k] and its scales [S, 1] or [1, 1]; b [E, n, k] and its scales
    [E, n, 1] or [E, 1, 1]; starts int64 [E + 1]: first row of each expert; sizes int32 [E, 3]."""
    (codes, scale), (weights, weights_scale) = a, b
    experts, n, k = weights.shape

    def strides(step: int) -> Tensor:
        return torch.full((experts,), step, dtype=torch.int64, device=out.device)

    return (
        *(out, codes, weights, scale.reshape(-1, 1), weights_scale.reshape(experts, -1)),
        *(starts[:-1], sizes, strides(k), strides(k), strides(n), by_token, by_token),
    )
