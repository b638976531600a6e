"""All elements in one row, as kernels take scales that have no rows and columns any more."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moe_fx.kernels.layouts.transforms.registry import Transform, transform


@transform("flatten")
@dataclass(frozen=True, slots=True)
class Flatten(Transform):
    """[...] → [elements]."""

    def pack(self, tensor: Tensor, partner: Tensor | None = None) -> Tensor:
        return tensor.reshape(-1)

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        return packed.reshape(like.shape)
