"""Scales of block-scaled products in tiles of 128 rows x 4 columns (CUTLASS and torch: 32_4_4).

Rows are padded with zeros to 128, columns to 4.  Within a tile, row r and column c lie at 16 * (r % 32) + 4 * (r // 32)
+ c; tiles follow each other along the columns, then along the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moe_fx.kernels.layouts.transforms.pad import Pad
from moe_fx.kernels.layouts.transforms.registry import Transform, transform

PADDED = Pad(rows=128, cols=4)


@transform("swizzle_128x4")
@dataclass(frozen=True, slots=True)
class Swizzle128x4(Transform):
    """[rows, cols] → [rows up to 128, cols up to 4], any dtype."""

    def pack(self, tensor: Tensor, partner: Tensor | None = None) -> Tensor:
        whole = PADDED.pack(tensor)
        rows, cols = whole.shape
        return whole.reshape(rows // 128, 4, 32, cols // 4, 4).permute(0, 3, 2, 1, 4).reshape(rows, cols)

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        rows, cols = packed.shape
        whole = packed.reshape(rows // 128, cols // 4, 32, 4, 4).permute(0, 3, 2, 1, 4).reshape(rows, cols)
        return PADDED.unpack(whole, like)
