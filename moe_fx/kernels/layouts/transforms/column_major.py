"""The same matrix, a column after the other in memory: strides (1, rows), or (1, rows up to ``align`` bytes).

torch's grouped products of scaled numbers want their second operand so; bulk copies of scales want columns that start
at multiples of 16 bytes (DeepGEMM).  What lies between the columns is zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_fx.kernels.layouts.transforms.registry import Transform, transform


@transform("column_major")
@dataclass(frozen=True, slots=True)
class ColumnMajor(Transform):
    """[rows, cols] → [rows, cols], other strides.  align: bytes; a multiple of the element's size, or 1."""

    align: int = 1

    def pack(self, tensor: Tensor, partner: Tensor | None = None) -> Tensor:
        rows, cols = tensor.shape
        step = max(1, self.align // tensor.element_size())
        out = tensor.new_zeros(cols, -(-rows // step) * step).mT[:rows]
        return out.copy_(tensor)

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        return torch.empty(packed.shape, dtype=packed.dtype, device=packed.device).copy_(packed)
