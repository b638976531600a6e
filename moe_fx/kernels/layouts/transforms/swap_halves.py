"""Gate and up change places: rows [gate; up] → [up; gate]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_fx.kernels.layouts.transforms.registry import Transform, need, transform


@transform("swap_halves")
@dataclass(frozen=True, slots=True)
class SwapHalves(Transform):
    """[2I, ...] → [2I, ...]: matrices, scales with one row an output channel, or biases."""

    def pack(self, tensor: Tensor, partner: Tensor | None = None) -> Tensor:
        need(self, tensor, rows=2)
        half = tensor.shape[0] // 2
        return torch.cat([tensor[half:], tensor[:half]])

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        return self.pack(packed)
