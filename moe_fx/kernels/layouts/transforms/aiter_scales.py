"""e8m0 scales in the tiles that AITER's kernels load: 32 rows x 8 columns.

Within a tile, row 16 a + r and column 4 b + c lie at 64 c + 4 r + 2 b + a.  Beside ``aiter_lanes`` of [gate; up] a
says gate or up, and a tile holds the same 16 rows of both.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moe_fx.kernels.layouts.transforms.registry import Transform, need, transform


@transform("aiter_scales")
@dataclass(frozen=True, slots=True)
class AiterScales(Transform):
    """[rows, cols] → the same shape.  halves: 2 for [gate; up] in a tile, else 1.

    AITER pads the rows of all experts together to 256; here an expert's rows are multiples of 32 and nothing is padded.
    """

    halves: int = 1

    def pack(self, tensor: Tensor, partner: Tensor | None = None) -> Tensor:
        need(self, tensor, rows=32, cols=8)
        if self.halves == 2:
            return tensor.reshape(2, -1, 16, tensor.shape[1] // 8, 2, 4).permute(1, 3, 5, 2, 4, 0).reshape(tensor.shape)
        return tensor.reshape(-1, 2, 16, tensor.shape[1] // 8, 2, 4).permute(0, 3, 5, 2, 4, 1).reshape(tensor.shape)

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        tiles = packed.reshape(-1, packed.shape[1] // 8, 4, 16, 2, 2)
        order = (5, 0, 3, 1, 4, 2) if self.halves == 2 else (0, 5, 3, 1, 4, 2)
        return tiles.permute(order).reshape(packed.shape)
