"""Matrices as the dot products of x86 CPUs read them: ``rows`` output channels side by side, ``group`` inputs each.

group 2 for products of 16-bit floats, 4 for 8-bit integers, 1 for plain vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_fx.kernels.layouts.transforms.registry import Transform, need, need_dtype, transform


@transform("vnni")
@dataclass(frozen=True, slots=True)
class Vnni(Transform):
    """[out, in] → the same shape, in memory [out / rows, in / group, rows, group]."""

    group: int = 2
    rows: int = 32

    def pack(self, tensor: Tensor, partner: Tensor | None = None) -> Tensor:
        need(self, tensor, rows=self.rows, cols=self.group)
        blocks = tensor.reshape(-1, self.rows, tensor.shape[1] // self.group, self.group)
        return blocks.transpose(1, 2).reshape(tensor.shape)

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        blocks = packed.reshape(-1, packed.shape[1] // self.group, self.rows, self.group)
        return blocks.transpose(1, 2).reshape(packed.shape)


@transform("vnni_int8")
@dataclass(frozen=True, slots=True)
class VnniInt8(Transform):
    """int8 [out, in] → [out, in + 4]: of every 32 channels the codes by fours, then 128 * their sum as 32 int32.

    The instruction multiplies unsigned by signed: activations are moved by 128, and the sums take that off again.
    """

    def pack(self, tensor: Tensor, partner: Tensor | None = None) -> Tensor:
        need_dtype(self, tensor, torch.int8)
        order = Vnni(group=4)
        sums = tensor.sum(1, dtype=torch.int32) * 128
        blocks = order.pack(tensor).reshape(-1, order.rows * tensor.shape[1])
        tails = sums.view(torch.int8).reshape(-1, order.rows * 4)
        return torch.cat([blocks, tails], 1).reshape(tensor.shape[0], -1)

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        order = Vnni(group=4)
        blocks = packed.reshape(-1, order.rows * packed.shape[1])[:, : order.rows * like.shape[1]]
        return order.unpack(blocks.reshape(like.shape), like)


@transform("vnni_nibbles")
@dataclass(frozen=True, slots=True)
class VnniNibbles(Transform):
    """uint8 [out, in / 2], two codes of 4 bits a byte → the same shape, for products of 16-bit floats.

    Of 32 channels, a byte holds one input of channels r (low) and r + 16 (high): in memory [out / 32, in / 2, 16, 2].
    """

    def pack(self, tensor: Tensor, partner: Tensor | None = None) -> Tensor:
        need_dtype(self, tensor, torch.uint8)
        need(self, tensor, rows=32)
        pairs = tensor.reshape(-1, 2, 16, tensor.shape[1])
        low, high = pairs[:, 0], pairs[:, 1]
        both = torch.stack([low & 15 | high << 4, low >> 4 | high & 0xF0], -1)
        return both.transpose(1, 2).reshape(tensor.shape)

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        both = packed.reshape(-1, packed.shape[1], 16, 2).transpose(1, 2)
        first, second = both.unbind(-1)
        return torch.stack([first & 15 | second << 4, first >> 4 | second & 0xF0], 1).reshape(packed.shape)
