"""Rows of a block mixed for the transposed product of TRT-LLM's kernels (``shuffleMatrixA``).

Blocks of B rows, B = 32 for an epilogue tile of 128 rows and 16 for one of 64.  Row m of a block goes to row
(m % 4) * 8 + m // 4 of it, or (m % 2) * 8 + m // 2: the transpose of the block seen as [8, B / 8].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from moe_fx.kernels.layouts.transforms.registry import Transform, need, transform


@transform("shuffle_matrix_a")
@dataclass(frozen=True, slots=True)
class ShuffleMatrixA(Transform):
    """[rows, ...] → [rows, ...].  tile: rows of the kernel's epilogue tile."""

    tile: Literal[64, 128] = 128

    @property
    def block(self) -> int:
        return 32 if self.tile % 128 == 0 else 16

    def pack(self, tensor: Tensor, partner: Tensor | None = None) -> Tensor:
        need(self, tensor, rows=self.block)
        return tensor.reshape(-1, 8, self.block // 8, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        return packed.reshape(-1, self.block // 8, 8, *packed.shape[1:]).transpose(1, 2).reshape(packed.shape)
