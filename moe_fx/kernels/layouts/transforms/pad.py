"""Rows and columns up to a multiple, each half of a gated matrix by itself: [gate; up] → [gate; 0; up; 0]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_fx.kernels.layouts.transforms.registry import Transform, need, transform


@transform("pad")
@dataclass(frozen=True, slots=True)
class Pad(Transform):
    """[rows, cols] or [rows] → the next multiples.

    rows: of each of ``halves`` equal parts of the rows.  cols: in elements as stored (bytes of packed codes).
    fill: the byte that every padded element consists of: 0 for zero, 127 for 1.0 in e8m0, 0x88 for two int4 zeros.
    small: (limit, multiple): parts or columns up to the limit take that multiple instead (AITER).
    """

    rows: int = 1
    cols: int = 1
    halves: int = 1
    fill: int = 0
    small: tuple[int, int] = (0, 1)

    def pack(self, tensor: Tensor, partner: Tensor | None = None) -> Tensor:
        need(self, tensor, rows=self.halves)
        part, cols = self._sizes(tensor)
        wide = self._up(part, self.rows), *(self._up(c, self.cols) for c in cols)
        if wide == (part, *cols):
            return tensor
        out = torch.empty(self.halves, *wide, dtype=tensor.dtype, device=tensor.device)
        out.view(torch.uint8).fill_(self.fill)
        _inside(out, part, cols).copy_(tensor.reshape(self.halves, part, *cols))
        return out.flatten(0, 1)

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        part, cols = self._sizes(like)
        return _inside(packed.reshape(self.halves, -1, *packed.shape[1:]), part, cols).reshape(like.shape)

    def _sizes(self, tensor: Tensor) -> tuple[int, tuple[int, ...]]:
        """(rows of a part, the sizes behind the rows)"""
        return tensor.shape[0] // self.halves, tuple(tensor.shape[1:])

    def _up(self, size: int, multiple: int) -> int:
        limit, other = self.small
        multiple = other if multiple > 1 and size <= limit else multiple
        return -(-size // multiple) * multiple


def _inside(whole: Tensor, part: int, cols: tuple[int, ...]) -> Tensor:
    """The part of [halves, rows, cols] that is not padding."""
    return whole[(slice(None), slice(part), *(slice(c) for c in cols))]
