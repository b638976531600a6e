"""Another floating dtype, where a kernel wants scales or biases in its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe_fx.kernels.layouts.transforms.registry import Transform, transform


@transform("cast")
@dataclass(frozen=True, slots=True)
class Cast(Transform):
    """Floats of 16 or 32 bits, any shape → ``dtype``; float32 holds all of them."""

    dtype: Literal["float32", "bfloat16", "float16"]

    @property
    def loss(self) -> str:
        return "" if self.dtype == "float32" else f"values of other dtypes are rounded to {self.dtype}"

    def pack(self, tensor: Tensor, partner: Tensor | None = None) -> Tensor:
        return tensor.to(getattr(torch, self.dtype))

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        return packed.to(like.dtype)
