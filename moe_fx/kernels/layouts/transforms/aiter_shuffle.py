"""Matrices in the tiles that AITER's kernels load.

Plain: tiles of 16 rows x 32 elements, each cut into runs of 16 bytes; within a tile run by run, in a run row by row.
By lanes (its kernels for mxfp8, and for mxfp4 with 16-bit activations): tiles of 16 rows x 64 bytes, the same way; each
16 rows of gate stand before the 16 rows of up of the same number.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moe_fx.kernels.layouts.transforms.registry import Transform, need, transform

ROWS, RUN = 16, 16  # rows of a tile, bytes of a run


@transform("aiter_shuffle")
@dataclass(frozen=True, slots=True)
class AiterShuffle(Transform):
    """[rows, cols] → the same shape, elements of 1, 2 or 4 bytes (two codes of 4 bits count as one)."""

    cols: int = 32  # elements of a tile, whatever their size

    def pack(self, tensor: Tensor, partner: Tensor | None = None) -> Tensor:
        need(self, tensor, rows=ROWS, cols=self.cols)
        run = RUN // tensor.element_size()
        tiles = tensor.reshape(-1, ROWS, tensor.shape[1] // self.cols, self.cols // run, run)
        return tiles.permute(0, 2, 3, 1, 4).reshape(tensor.shape)

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        run = RUN // packed.element_size()
        tiles = packed.reshape(-1, packed.shape[1] // self.cols, self.cols // run, ROWS, run)
        return tiles.permute(0, 3, 1, 2, 4).reshape(packed.shape)


@transform("aiter_lanes")
@dataclass(frozen=True, slots=True)
class AiterLanes(Transform):
    """[rows, bytes] → the same shape, elements of one byte.  halves: 2 for [gate; up], 1 for w2."""

    halves: int = 1

    def pack(self, tensor: Tensor, partner: Tensor | None = None) -> Tensor:
        need(self, tensor, rows=ROWS * self.halves, cols=4 * RUN)
        tiles = tensor.reshape(self.halves, -1, ROWS, tensor.shape[1] // (4 * RUN), 4, RUN)
        return tiles.permute(1, 0, 3, 4, 2, 5).reshape(tensor.shape)

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        tiles = packed.reshape(-1, self.halves, packed.shape[1] // (4 * RUN), 4, ROWS, RUN)
        return tiles.permute(1, 0, 4, 2, 3, 5).reshape(packed.shape)
