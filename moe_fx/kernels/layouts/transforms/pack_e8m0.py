"""Four scales that are powers of two in one int32, the first in the lowest byte (DeepGEMM on Blackwell).

A byte is the exponent + 127: that of a float32 scale, or an e8m0 scale as it is.  Columns are filled up with byte 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_fx.kernels.layouts.transforms.pad import Pad
from moe_fx.kernels.layouts.transforms.registry import Transform, has_data, need_dtype, transform

FOURS = Pad(cols=4)


@transform("pack_e8m0")
@dataclass(frozen=True, slots=True)
class PackE8M0(Transform):
    """[rows, cols] float32, float8_e8m0fnu or uint8 → int32 [rows, ceil(cols / 4)].

    float32 scales that are no powers of two (requantise first) are a ValueError.
    """

    def pack(self, tensor: Tensor, partner: Tensor | None = None) -> Tensor:
        need_dtype(self, tensor, torch.float32, torch.float8_e8m0fnu, torch.uint8)
        return FOURS.pack(self._bytes(tensor)).contiguous().view(torch.int32)

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        exponents = packed.contiguous().view(torch.uint8)[:, : like.shape[1]].contiguous()
        if like.dtype == torch.float32:
            return (exponents.to(torch.int32) << 23).view(torch.float32)
        return exponents.view(like.dtype)

    def _bytes(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32:
            return tensor.view(torch.uint8)
        bits = tensor.contiguous().view(torch.int32)
        if has_data(bits) and bool(((bits & ~(0xFF << 23)) != 0).any()):
            raise ValueError("pack_e8m0 needs scales that are powers of two: requantise first")
        return (bits >> 23).to(torch.uint8)
