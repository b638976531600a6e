"""Blocks of columns one after the other: [rows, cols] → [cols / b, rows, b], b columns being ``width`` bytes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moe_fx.kernels.layouts.transforms.registry import Transform, need, transform


@transform("block_major_k")
@dataclass(frozen=True, slots=True)
class BlockMajorK(Transform):
    """width: bytes of a row within a block; 128 is 64 columns of bfloat16 or 128 of float8 (TRT-LLM)."""

    width: int = 128

    def pack(self, tensor: Tensor, partner: Tensor | None = None) -> Tensor:
        block = self.width // tensor.element_size()
        need(self, tensor, cols=block)
        return tensor.reshape(tensor.shape[0], -1, block).transpose(0, 1).contiguous()

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        return packed.transpose(0, 1).reshape(like.shape)
