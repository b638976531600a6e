"""fp8 codes with block scales → codes whose scales are powers of two (DeepGEMM's ue8m0), for codes and for scales.

With w the value of an element, in float32: new scale of a block = 2^ceil(log2(max(amax |w|, 1e-4) / 448)), new code =
w / scale rounded to e4m3.  A second time leaves every value as it is; where the largest code is exactly 224 it halves
the scale and doubles the codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moe_fx.kernels.layouts.transforms.registry import Transform, need_dtype, need_partner, transform
from moe_fx.quant import MAX_OF

MANTISSA = (1 << 23) - 1  # of a float32
SMALLEST = 1e-4  # amax of a block counts as at least this


def requantise(codes: Tensor, scale: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """codes [rows, cols] float8_e4m3fn, scale [ceil(rows / block), ceil(cols / block)] float32 → the same, new."""
    rows, cols = codes.shape
    whole = scale.shape[0] * block, scale.shape[1] * block
    values = torch.zeros(whole, dtype=torch.float32, device=codes.device)  # the one large temporary: all is in place
    values[:rows, :cols] = codes
    blocks = values.view(scale.shape[0], block, scale.shape[1], block)
    blocks.mul_(scale[:, None, :, None])
    largest = torch.maximum(blocks.amax((1, 3)), -blocks.amin((1, 3)))
    new = _power_of_two(largest.clamp(min=SMALLEST) / MAX_OF["float8_e4m3fn"])
    blocks.mul_(1.0 / new[:, None, :, None])
    return values[:rows, :cols].to(codes.dtype), new


def _power_of_two(values: Tensor) -> Tensor:
    """The next power of two, upwards; float32, positive and finite."""
    return ((values.view(torch.int32) + MANTISSA) & ~MANTISSA).view(torch.float32)


@dataclass(frozen=True, slots=True)
class _Requantise(Transform):
    paired: ClassVar[bool] = True
    block: int = 128

    @property
    def loss(self) -> str:
        return "codes are rounded anew to scales that are powers of two"

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        return packed


@transform("requantise_codes")
@dataclass(frozen=True, slots=True)
class RequantiseCodes(_Requantise):
    """float8_e4m3fn [rows, cols] (with their scales) → the new codes; unpacked they go with the new scales."""

    def pack(self, tensor: Tensor, partner: Tensor | None = None) -> Tensor:
        need_dtype(self, tensor, torch.float8_e4m3fn)
        return requantise(tensor, need_partner(self, partner), self.block)[0]


@transform("requantise_scales")
@dataclass(frozen=True, slots=True)
class RequantiseScales(_Requantise):
    """float32 [ceil(rows / block), ceil(cols / block)] (with the codes) → the new scales."""

    def pack(self, tensor: Tensor, partner: Tensor | None = None) -> Tensor:
        need_dtype(self, tensor, torch.float32)
        return requantise(need_partner(self, partner), tensor, self.block)[1]
