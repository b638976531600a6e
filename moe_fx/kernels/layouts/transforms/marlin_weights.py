"""Codes in the order in which Marlin's threads read them, as int32.

Of q [in, out]: tiles of 16 x 16 codes (32 x 16 where activations have 8 bits) follow each other along the rows.  Each
run of 1024 codes is put in the order of the lanes of a tensor-core fragment: lane i < 32 holds column i / 4 of a tile
and rows that i % 4 selects, for each of the 4 (or 2) tiles of a run; then 8 codes of 4 bits, or 4 of 8 bits, are put
such that two masks unpack them, and go into an int32, the first lowest.  As every step is a change of places of bits of
the index, the whole is one permutation of dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe_fx.kernels.layouts.transforms.pack_nibbles import PackNibbles
from moe_fx.kernels.layouts.transforms.registry import Transform, need, transform

INT32 = PackNibbles("int32")
# bits of (a code, an activation) → (sizes that the rows and the columns of a run of tiles are split into, their order).
# rows: half of the tile, lane's low bits, row of the lane; columns: tile, half of the tile, lane's high bits
ORDER: dict[tuple[int, int], tuple[tuple[int, int, int], tuple[int, int, int], tuple[int, ...]]] = {
    (4, 16): ((2, 4, 2), (4, 2, 8), (5, 1, 3, 2, 4, 0)),
    (8, 16): ((2, 4, 2), (4, 2, 8), (5, 1, 3, 4, 2, 0)),
    (4, 8): ((2, 4, 4), (2, 2, 8), (5, 1, 3, 4, 2, 0)),
    (8, 8): ((2, 4, 4), (2, 2, 8), (5, 1, 3, 4, 0, 2)),
}


@transform("marlin_weights")
@dataclass(frozen=True, slots=True)
class MarlinWeights(Transform):
    """Codes [out, in] of 8 bits, or [out, in / 2] with two of 4 bits a byte → int32 [in / 16, out * 16 / codes a word].

    bits: of a code.  activation_bits: of the other operand as the kernel multiplies it.
    """

    bits: Literal[4, 8] = 4
    activation_bits: Literal[16, 8] = 16

    def pack(self, tensor: Tensor, partner: Tensor | None = None) -> Tensor:
        rows, cols, order = ORDER[self.bits, self.activation_bits]
        high, wide = rows[0] * rows[1] * rows[2], cols[0] * cols[1] * cols[2]
        need(self, tensor, rows=wide, cols=high * self.bits // 8)
        codes = tensor.contiguous().view(torch.uint8)
        codes = INT32.unpack(codes, codes) if self.bits == 4 else codes
        outs, ins = codes.shape
        runs = codes.t().reshape(ins // high, *rows, outs // wide, *cols)
        runs = runs.permute(0, 4, *(_dim(d) for d in order)).reshape(ins // 16, outs * 16)
        return INT32.pack(runs) if self.bits == 4 else runs.view(torch.int32)

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        rows, cols, order = ORDER[self.bits, self.activation_bits]
        high, wide = rows[0] * rows[1] * rows[2], cols[0] * cols[1] * cols[2]
        outs, ins = like.shape[0], like.shape[1] * 8 // self.bits
        runs = INT32.unpack(packed, packed) if self.bits == 4 else packed.contiguous().view(torch.uint8)
        sizes = (*rows, *cols)
        runs = runs.reshape(ins // high, outs // wide, *(sizes[d] for d in order))
        back = [order.index(d) + 2 for d in range(6)]
        codes = runs.permute(0, *back[:3], 1, *back[3:]).reshape(ins, outs).t().contiguous()
        codes = PackNibbles().pack(codes) if self.bits == 4 else codes
        return codes.view(like.dtype)


def _dim(split: int) -> int:
    """Where the row or column split of that number stands: rows at 1 … 3, columns at 5 … 7."""
    return split + 1 if split < 3 else split + 2
