"""Block scales of a gated matrix are refused where a block holds rows of gate and of up.

Halves of such scales cannot change places.  Changes nothing; it stands before the steps that need it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moe_fx.kernels.layouts.transforms.registry import Transform, need_partner, transform


@transform("whole_blocks")
@dataclass(frozen=True, slots=True)
class WholeBlocks(Transform):
    """Scales [2I / block, ...] of codes [2I, ...] → the same.  block: rows that share a scale."""

    paired: ClassVar[bool] = True
    block: int = 128

    def pack(self, tensor: Tensor, partner: Tensor | None = None) -> Tensor:
        rows = need_partner(self, partner).shape[0]
        if rows % (2 * self.block):
            raise ValueError(
                f"gate and up of {rows // 2} rows each share a block of {self.block} rows: use a kernel that reads the "
                "checkpoint's own order, or an intermediate size (after tensor parallelism) of whole blocks"
            )
        return tensor

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        return packed
