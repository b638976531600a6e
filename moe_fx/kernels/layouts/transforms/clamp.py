"""Scales from below: near-zero scales of experts that are never used give NaN in some kernels of FlashInfer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moe_fx.kernels.layouts.transforms.registry import Transform, transform


@transform("clamp")
@dataclass(frozen=True, slots=True)
class Clamp(Transform):
    """Floats of any shape → the same, at least ``minimum``."""

    minimum: float = 1e-10

    @property
    def loss(self) -> str:
        return f"values below {self.minimum:g} become {self.minimum:g}"

    def pack(self, tensor: Tensor, partner: Tensor | None = None) -> Tensor:
        return tensor.clamp(min=self.minimum)

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        return packed
