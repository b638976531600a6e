"""One scale a block of rows → one a row: what a tensor or a block shares is written out per output channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moe_fx.kernels.layouts.transforms.registry import Transform, need_partner, transform


@transform("expand_rows")
@dataclass(frozen=True, slots=True)
class ExpandRows(Transform):
    """Scales [ceil(rows / block), cols] of codes [rows, ...] → [rows, cols].  block: -1 for one scale for all rows."""

    paired: ClassVar[bool] = True
    block: int = 128

    def pack(self, tensor: Tensor, partner: Tensor | None = None) -> Tensor:
        rows = need_partner(self, partner).shape[0]
        block = rows if self.block == -1 else self.block
        if tensor.shape[0] != -(-rows // block):
            raise ValueError(f"{tensor.shape[0]} rows of scales for {rows} rows of codes in blocks of {block}")
        return tensor.repeat_interleave(block, 0)[:rows]

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        return packed[:: packed.shape[0] if self.block == -1 else self.block]
