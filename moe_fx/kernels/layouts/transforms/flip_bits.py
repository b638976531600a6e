"""Some bits of every byte flipped: int8 codes → codes + 128 (0x80), unsigned int4 with zero 8 ↔ signed (0x88)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_fx.kernels.layouts.transforms.registry import Transform, need_dtype, transform


@transform("flip_bits")
@dataclass(frozen=True, slots=True)
class FlipBits(Transform):
    """int8 or uint8 of any shape → uint8."""

    mask: int = 0x80

    def pack(self, tensor: Tensor, partner: Tensor | None = None) -> Tensor:
        need_dtype(self, tensor, torch.int8, torch.uint8)
        return tensor.view(torch.uint8) ^ self.mask

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        return (packed ^ self.mask).view(like.dtype)
