"""Rows become columns: [out, in] → [in, out], row-major."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moe_fx.kernels.layouts.transforms.registry import Transform, transform


@transform("transpose")
@dataclass(frozen=True, slots=True)
class Transpose(Transform):
    """[rows, cols] → [cols, rows]."""

    def pack(self, tensor: Tensor, partner: Tensor | None = None) -> Tensor:
        return tensor.mT.contiguous()

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        return packed.mT.contiguous()
