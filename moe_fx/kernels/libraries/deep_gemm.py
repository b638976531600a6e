"""DeepGEMM's grouped products of float8 blocks, for Hopper: a list of rows by expert, or one batch an expert.

Rows of an expert start at a multiple of ALIGNMENT; what lies between is named -1 and skipped.  Scales are float32, as
the model holds them (``disable_ue8m0_cast``).  Blackwell wants powers of two, for which codes and scales have to be
made anew together: not adapted.  Not run: no GPU here.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from moe_fx.binding import Experts, Matrices
from moe_fx.kernels.experts.rows import activate
from moe_fx.kernels.experts.torch_experts import BatchedExperts
from moe_fx.kernels.libraries.adapter import (
    ByExpert,
    GroupedExperts,
    LibraryExperts,
    adapter,
    attribute,
    package,
    rounded_rows,
    scaled,
)
from moe_fx.kernels.libraries.rows import SM90
from moe_fx.kernels.modular_kernel.formats import ExpertTokensMetadata
from moe_fx.spec import MoESpec

ALIGNMENT = 128  # get_mk_alignment_for_contiguous_layout() on Hopper


def function(name: str) -> Any:
    """Of the library."""
    return attribute(package("deep_gemm"), name)


@adapter("deepgemm", rank=12, archs=SM90)
class DeepGemmExperts(GroupedExperts):
    @classmethod
    def layout_for(cls, spec: MoESpec) -> str:
        return "deepgemm.fp8_block"

    def products(self, rows: Tensor, matrices: Matrices, operand: Literal["a1", "a2"], sorted_: ByExpert) -> Tensor:
        places, layout = aligned(sorted_)
        codes, scale = self.rounded(rows, operand)
        spread = codes.new_zeros(len(layout), codes.shape[1]), scale.new_ones(len(layout), scale.shape[1])
        for target, values in zip(spread, (codes, scale), strict=True):
            target.view(torch.uint8).view(len(layout), -1)[places] = values.view(torch.uint8)
        weights = scaled(matrices)
        out = rows.new_empty(len(layout), weights[0].shape[1])
        function("m_grouped_fp8_gemm_nt_contiguous")(**contiguous_arguments(spread, weights, out, layout))
        return out.index_select(0, places)


def aligned(sorted_: ByExpert) -> tuple[Tensor, Tensor]:
    """(places int64 [S]: where each sorted row goes, layout int32 [M]: the expert of each of the M rows there, or -1).

    M is bounded without knowing the counts: nothing waits for the device.
    """
    ends = sorted_.ends.long()
    counts = ends.diff(prepend=ends.new_zeros(1))
    room = (counts + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    starts = room.cumsum(0) - room
    expert, rows = sorted_.expert.long(), len(sorted_.expert)
    places = starts[expert] + torch.arange(rows, device=ends.device) - (ends - counts)[expert]
    most = -(-rows // ALIGNMENT) + min(rows, len(ends))  # blocks: every expert with rows leaves at most one unfilled
    layout = torch.full((most * ALIGNMENT,), -1, dtype=torch.int32, device=ends.device)
    layout[places] = sorted_.expert
    return places, layout


Pair = tuple[Tensor, Tensor]  # codes and scales


def contiguous_arguments(a: Pair, b: Pair, out: Tensor, layout: Tensor) -> dict[str, Any]:
    """Of ``m_grouped_fp8_gemm_nt_contiguous``: a [M, in], its scales [M, in / 128]; b [E, out, in], its scales
    [E, out / 128, in / 128]; out [M, out] bfloat16; layout int32 [M]."""
    return dict(a=a, b=b, d=out, grouped_layout=layout, disable_ue8m0_cast=True)


def masked_arguments(a: Pair, b: Pair, out: Tensor, counts: Tensor, expected: int) -> dict[str, Any]:
    """Of ``m_grouped_fp8_gemm_nt_masked``: a [E, M, in], its scales [E, M, in / 128]; out [E, M, out]; counts int32
    [E]; expected: rows of an expert to choose a kernel for."""
    return dict(a=a, b=b, d=out, masked_m=counts, expected_m=expected, disable_ue8m0_cast=True)


@adapter("batched_deepgemm", rank=62, archs=SM90)
class BatchedDeepGemmExperts(BatchedExperts, LibraryExperts):
    """x [El, M, H] with counts → [El, M, H]; rows after a count stay undefined."""

    @classmethod
    def layout_for(cls, spec: MoESpec) -> str:
        return "deepgemm.fp8_block"

    def batches(
        self, output: Tensor, x: Tensor, experts: Experts, spec: MoESpec, meta: ExpertTokensMetadata, routed: int
    ) -> None:
        counts, tokens = meta.expert_num_tokens, -(-routed // spec.expert.experts)
        up = self._masked(x, experts.up[0], "a1", counts, tokens)
        hidden = activate([up.flatten(0, 1)], experts, spec.expert).view(*up.shape[:2], -1)
        output.copy_(self._masked(hidden, experts.down, "a2", counts, tokens))

    def _masked(
        self, rows: Tensor, matrices: Matrices, operand: Literal["a1", "a2"], counts: Tensor, tokens: int
    ) -> Tensor:
        codes, scale = rounded_rows(rows.flatten(0, 1), self.spec, operand)
        a = codes.view(*rows.shape), scale.view(*rows.shape[:2], -1)
        weights = scaled(matrices)
        out = rows.new_empty(*rows.shape[:2], weights[0].shape[1])
        function("m_grouped_fp8_gemm_nt_masked")(**masked_arguments(a, weights, out, counts, max(tokens, 1)))
        return out
