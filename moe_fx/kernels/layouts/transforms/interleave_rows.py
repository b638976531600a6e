"""Gate and up in turn: rows [gate; up] → ``group`` rows of the one, ``group`` rows of the other, and so on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from moe_fx.kernels.layouts.transforms.registry import Transform, need, transform


@transform("interleave_rows")
@dataclass(frozen=True, slots=True)
class InterleaveRows(Transform):
    """[2I, ...] → [2I, ...].  first: whose rows come first; "up" is what swapping the halves before would give."""

    group: int = 1
    first: Literal["gate", "up"] = "gate"

    def pack(self, tensor: Tensor, partner: Tensor | None = None) -> Tensor:
        need(self, tensor, rows=2 * self.group)
        halves = tensor.reshape(2, -1, self.group, *tensor.shape[1:])
        halves = halves.flip(0) if self.first == "up" else halves
        return halves.transpose(0, 1).reshape(tensor.shape)

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        halves = packed.reshape(-1, 2, self.group, *packed.shape[1:]).transpose(0, 1)
        return (halves.flip(0) if self.first == "up" else halves).reshape(packed.shape)
