"""Gate and up apart: rows in turn → [gate; up], for checkpoints that store them in turn."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moe_fx.kernels.layouts.transforms.interleave_rows import InterleaveRows
from moe_fx.kernels.layouts.transforms.registry import Transform, need, transform


@transform("deinterleave_rows")
@dataclass(frozen=True, slots=True)
class DeinterleaveRows(Transform):
    """[2I, ...] → [2I, ...], the inverse of ``interleave_rows``."""

    group: int = 1

    def pack(self, tensor: Tensor, partner: Tensor | None = None) -> Tensor:
        need(self, tensor, rows=2 * self.group)
        return InterleaveRows(self.group).unpack(tensor, tensor)

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        return InterleaveRows(self.group).pack(packed)
