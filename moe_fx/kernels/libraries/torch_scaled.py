"""PyTorch's own grouped products of float8 rows: one scale a token, one an output channel.  Not run: no GPU here."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_fx.binding import Matrices
from moe_fx.kernels.libraries.adapter import ByExpert, GroupedExperts, adapter, scaled
from moe_fx.spec import MoESpec


@adapter("torch_scaled_grouped", rank=15)
class TorchScaledGroupedExperts(GroupedExperts):
    @classmethod
    def layout_for(cls, spec: MoESpec) -> str:
        return "torch_scaled_grouped.fp8_channel"

    def products(self, rows: Tensor, matrices: Matrices, operand: Literal["a1", "a2"], sorted_: ByExpert) -> Tensor:
        codes, scale = self.rounded(rows, operand)
        return F.scaled_grouped_mm(**arguments(codes, scale, *scaled(matrices), sorted_.ends, rows.dtype))


def arguments(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, ends: Tensor, dtype: torch.dtype
) -> dict[str, Any]:
    """Of ``torch.nn.functional.scaled_grouped_mm``.

    a [S, in] and a_scale [S, 1] of rows by expert; b [E, in, out], in running fastest, and b_scale [E, out]; ends int32
    [E]: after each expert's last row.  → [S, out] in ``dtype``.
    """
    by_row = F.ScalingType.RowWise
    return dict(
        mat_a=a,
        mat_b=b,
        scale_a=a_scale.reshape(-1),
        scale_recipe_a=by_row,
        scale_b=b_scale,
        scale_recipe_b=by_row,
        offs=ends,
        output_dtype=dtype,
    )
