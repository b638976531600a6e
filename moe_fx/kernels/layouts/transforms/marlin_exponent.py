"""Scales of fp8 codes with the difference of exponents in them: Marlin shifts codes into 16-bit floats, no more.

e4m3 has exponent bias 7, float16 15, bfloat16 127: a code read so is 2^8 or 2^120 too small, and the scale makes up
for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe_fx.kernels.layouts.transforms.registry import Transform, has_data, need_dtype, transform

EXPONENT = {"float16": 8, "bfloat16": 120}


@transform("marlin_exponent")
@dataclass(frozen=True, slots=True)
class MarlinExponent(Transform):
    """Scales of that dtype, any shape → the same, times a power of two; ValueError where one would overflow."""

    dtype: Literal["bfloat16", "float16"] = "bfloat16"

    def pack(self, tensor: Tensor, partner: Tensor | None = None) -> Tensor:
        need_dtype(self, tensor, getattr(torch, self.dtype))
        packed = tensor * 2.0 ** EXPONENT[self.dtype]
        if has_data(packed) and not bool(packed.isfinite().all()):
            raise ValueError(f"a scale times 2^{EXPONENT[self.dtype]} is over {self.dtype}'s range: no Marlin for it")
        return packed

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        return packed * 2.0 ** -EXPONENT[self.dtype]
