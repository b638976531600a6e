"""Codes of four bits, one a byte → two a byte or eight an int32, the first lowest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe_fx.kernels.layouts.transforms.registry import Transform, has_data, need, need_dtype, transform


@transform("pack_nibbles")
@dataclass(frozen=True, slots=True)
class PackNibbles(Transform):
    """uint8 [..., cols], 0 … 15 → [..., cols / 2] uint8 or [..., cols / 8] int32."""

    word: Literal["uint8", "int32"] = "uint8"

    def pack(self, tensor: Tensor, partner: Tensor | None = None) -> Tensor:
        need_dtype(self, tensor, torch.uint8)
        need(self, tensor, cols=2 if self.word == "uint8" else 8)
        if has_data(tensor) and bool((tensor > 15).any()):
            raise ValueError("pack_nibbles takes codes of four bits, one a byte, and some are over 15")
        pairs = tensor[..., 0::2] | (tensor[..., 1::2] << 4)
        return pairs.contiguous().view(getattr(torch, self.word))

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        pairs = packed.contiguous().view(torch.uint8)
        return torch.stack([pairs & 15, pairs >> 4], -1).flatten(-2)
