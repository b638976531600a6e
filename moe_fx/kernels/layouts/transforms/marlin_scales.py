"""Scales and biases in the order in which Marlin's threads read them; every order here is its own inverse.

Channels by 64: entry 8 i + j is channel i + 8 j.  Where a channel has one scale, where activations have 8 bits, and for
biases, by 32: entry 8 i + 2 b + a is channel 2 i + 8 b + a.
Scales of one byte are unpacked in pairs, so there every four are read as 0, 2, 1, 3 besides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from moe_fx.kernels.layouts.transforms.registry import Transform, need, transform

Split = tuple[int, int, int]  # of a run of channels; the first two change places
BY_64: Split = (8, 8, 1)
BY_32: Split = (4, 4, 2)
BY_4: Split = (2, 2, 1)


def _reorder(step: Transform, tensor: Tensor, split: Split) -> Tensor:
    """[..., channels] → the same shape."""
    need(step, tensor, cols=split[0] * split[1] * split[2])
    return tensor.reshape(*tensor.shape[:-1], -1, *split).transpose(-2, -3).reshape(tensor.shape)


@transform("marlin_scales")
@dataclass(frozen=True, slots=True)
class MarlinScales(Transform):
    """[out, groups] → [groups, out]."""

    activation_bits: Literal[16, 8] = 16

    def pack(self, tensor: Tensor, partner: Tensor | None = None) -> Tensor:
        return _reorder(self, tensor.mT, self._split(tensor))

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        return _reorder(self, packed, self._split(like)).mT.contiguous()

    def _split(self, tensor: Tensor) -> Split:
        return BY_64 if tensor.shape[1] > 1 and self.activation_bits == 16 else BY_32


@transform("marlin_byte_scales")
@dataclass(frozen=True, slots=True)
class MarlinByteScales(Transform):
    """[groups, out], after ``marlin_scales`` → the same shape."""

    def pack(self, tensor: Tensor, partner: Tensor | None = None) -> Tensor:
        return _reorder(self, tensor, BY_4)

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        return _reorder(self, packed, BY_4)


@transform("marlin_bias")
@dataclass(frozen=True, slots=True)
class MarlinBias(Transform):
    """[out] → [out]."""

    def pack(self, tensor: Tensor, partner: Tensor | None = None) -> Tensor:
        return _reorder(self, tensor, BY_32)

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        return _reorder(self, packed, BY_32)
