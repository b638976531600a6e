"""nvfp4's e4m3 scales as Marlin reads them: no sign, five bits of exponent, three of mantissa, highest bit always 1.

The byte is bits 7 … 14 of float16(scale * factor * 2^7).  Its highest bit is 1 from 2 on; what stays below becomes 0.
``factor``, a power of two that the caller divides the global scale by, lifts the scales of all experts to the end of
the range; with float16 activations it stays 1 (their range is too small for more).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_fx.kernels.layouts.transforms.registry import Transform, has_data, need_dtype, transform
from moe_fx.quant import MAX_OF

SHIFT = 7  # both of the scale (2^7) and of the mantissa: 10 bits of float16 → 3
LOWEST, HIGHEST = 2.0, 65504.0


@transform("marlin_s0e5m3")
@dataclass(frozen=True, slots=True)
class MarlinS0E5M3(Transform):
    """float8_e4m3fn of any shape → the bytes, as float8_e4m3fn.  Scales below 0, or too large, are a ValueError."""

    factor: float = 1.0

    @property
    def loss(self) -> str:
        return f"scales below {LOWEST / 2**SHIFT / self.factor:g} become 0"

    def pack(self, tensor: Tensor, partner: Tensor | None = None) -> Tensor:
        need_dtype(self, tensor, torch.float8_e4m3fn)
        scaled = tensor.float() * (self.factor * 2**SHIFT)
        if has_data(scaled) and not bool(((scaled >= 0) & (scaled <= HIGHEST)).all()):
            raise ValueError(f"marlin_s0e5m3 takes scales from 0 to {HIGHEST / 2**SHIFT / self.factor:g}")
        half = torch.where(scaled < LOWEST, 0.0, scaled).half()
        return (half.view(torch.int16) >> SHIFT).to(torch.uint8).view(torch.float8_e4m3fn)

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        half = (packed.view(torch.uint8).to(torch.int16) << SHIFT).view(torch.float16)
        return (half.float() / (self.factor * 2**SHIFT)).to(like.dtype)

    def fit(self, tensors: Iterable[Tensor]) -> MarlinS0E5M3:
        """With the largest factor under which the largest scale is still held: no other keeps more small ones."""
        largest = max((float(tensor.float().max()) for tensor in tensors), default=0.0)
        return replace(self, factor=2.0 ** math.floor(math.log2(MAX_OF["float8_e4m3fn"] / largest)) if largest else 1.0)
