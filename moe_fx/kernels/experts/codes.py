"""The matrix that codes stand for, made fast: ``reference.quantise.dequantise`` to the bit, in two or three passes.

The scales of whole rows, or of a whole matrix, multiply the product instead (``numbers``, ``scales``).

codes → numbers: pairs of them out of a table (two bytes of e4m3, a byte of four bits), where torch's own cast of e4m3
asks one number at a time; int8 needs none.  numbers - zero: whole numbers, exact.  numbers * scale: in float32, rounded
once.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_fx.binding import Matrices, Quantised
from moe_fx.quant import ZERO_OF, QuantKey
from moe_fx.reference.formats import CODEBOOKS, CODED, decode, unpack
from moe_fx.reference.quantise import dequantise

# Of ``Cost.dequantise``: bytes a weight, ops an expert.  A guess for all schemes together: four bits and e4m3 with
# blocks are the slowest.
DEQUANTISE = (18.0, 10)
BLOCK = 1 << 18  # numbers of a matrix that a CPU makes at a time
_BITSANDBYTES = {"nf4": "nf4", "fp4_bnb": "fp4"}
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # of bitsandbytes
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_WORDS = {2: torch.int32, 4: torch.int64}  # size of a number → a word that holds two


class _Parts(NamedTuple):
    """What one expert's matrix is made of."""

    key: QuantKey
    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    whole: Tensor | None

    @classmethod
    def of(cls, found: Quantised) -> _Parts:
        parts: Any = (found.codes, found.scale, found.zero, found.global_scale)  # of one expert they are tensors
        return cls(found.key, *parts)

    @property
    def size(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.codes.shape[1] * 8 // self.key.bits

    @property
    def block(self) -> int:
        """Inputs that share a scale."""
        return self.size[1] if self.key.group.col == -1 else self.key.group.col


def matrix(matrices: Matrices, e: int, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The matrix [out, in] of expert ``e`` in ``dtype``, plain or quantised; of no other expert.  out: a tensor of that
    shape and dtype, where codes may be written to."""
    found = matrices[e]
    if not isinstance(found, Quantised):
        return found.to(dtype)
    if found.key.bits not in (4, 8) or dtype not in _DTYPES:
        return dequantise(found, dtype)
    parts, key = _Parts.of(found), found.key
    if _of_bitsandbytes(parts):
        return _by_bitsandbytes(parts, dtype)
    scale = parts.scale.float() if parts.whole is None else parts.whole.float() * parts.scale.float()
    if out is None:
        out = torch.empty(parts.size, dtype=dtype, device=parts.codes.device)
    step = _step(key, parts.size[1]) if parts.codes.device.type == "cpu" else parts.size[0]
    space = _Space()
    for first in range(0, parts.size[0], step):
        rows = slice(first, first + step)
        values, place = _numbers(parts.codes[rows], key, dtype, space), out[rows]
        if parts.zero is not None:
            exact = torch.empty_like(place)
            _each(torch.sub, values, _rows(parts.zero, key, rows).float(), key, exact)
            values = exact
        _each(torch.mul, values, _rows(scale, key, rows), key, place)
    return out


def scaled_after(matrices: Matrices, dtype: torch.dtype) -> bool:
    """Whether a product with ``numbers`` can be scaled instead of the matrix: one scale an output, or one for all.
    Products of float16 could overflow."""
    if not isinstance(matrices, Quantised) or dtype not in (torch.bfloat16, torch.float32):
        return False
    key = matrices.key
    return key.bits == 8 and key.group in ((1, -1), (-1, -1)) and not key.zero_points and not key.global_scale


def numbers(matrices: Quantised, e: int, dtype: torch.dtype) -> Tensor:
    """The codes [out, in] of expert ``e`` as numbers."""
    return _numbers(_Parts.of(matrices[e]).codes, matrices.key, dtype, _Space()).to(dtype)


def scales(matrices: Quantised, e: int) -> Tensor:
    """float32 [out], or [1]: what multiplies the results of ``numbers``."""
    return _Parts.of(matrices[e]).scale.float().reshape(-1)


def _of_bitsandbytes(parts: _Parts) -> bool:
    """Whether codes and scales lie as bitsandbytes has them, in blocks that it knows, and it is loaded."""
    if parts.key.dtype not in _BITSANDBYTES or "bitsandbytes" not in sys.modules:
        return False
    whole = parts.codes.is_contiguous() and parts.scale.is_contiguous() and parts.scale.dtype is torch.float32
    return whole and parts.key.group.row == 1 and parts.size[1] % parts.block == 0 and parts.block in _BLOCKS


def _by_bitsandbytes(parts: _Parts, dtype: torch.dtype) -> Tensor:
    """Its own op: the same bits, in one pass."""
    flat = parts.codes.view(-1, 1), parts.scale.view(-1)
    name = _BITSANDBYTES[parts.key.dtype]
    made: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(*flat, parts.block, name, list(parts.size), dtype)
    return made


def _step(key: QuantKey, cols: int) -> int:
    """Rows at a time, whole groups of them: what lies between stays in the cache."""
    row = max(key.group.row, 1)
    return max(BLOCK // max(cols, 1) // row, 1) * row


def _rows(groups: Tensor, key: QuantKey, rows: slice) -> Tensor:
    """Of one value a group those of some rows, the first of which begins a group."""
    row = key.group.row
    if row == -1:
        return groups
    return groups[rows] if row == 1 else groups[rows.start // row : -(-rows.stop // row)]


def _each(function: Any, numbers: Tensor, groups: Tensor, key: QuantKey, out: Tensor) -> None:
    """out [rows, cols] = function(number, value of its group), in float32, rounded once."""
    (rows, cols), (row, col) = out.shape, key.group
    if row not in (-1, 1):
        groups = groups.repeat_interleave(row, 0)[:rows]
    if col == -1 or col >= cols:
        function(numbers, groups, out=out)
    elif cols % col:
        function(numbers, groups.repeat_interleave(col, 1)[:, :cols], out=out)
    else:
        apart = (rows, cols // col, col)
        function(numbers.reshape(apart), groups[..., None], out=out.view(apart))


class _Space:
    """Room for what lies between codes and numbers: the same for every block of a matrix."""

    def __init__(self) -> None:
        self.index = self.words = torch.empty(0)

    def look_up(self, table: Tensor, codes: Tensor) -> Tensor:
        """table[code] for every code, flat; overwritten by the next call."""
        if self.words.dtype != table.dtype or self.words.numel() < codes.numel():
            self.index = torch.empty(codes.numel(), dtype=torch.int32, device=codes.device)
            self.words = torch.empty(codes.numel(), dtype=table.dtype, device=codes.device)
        index, words = self.index[: codes.numel()], self.words[: codes.numel()]
        index.copy_(codes.reshape(-1))
        return torch.index_select(table, 0, index, out=words)


def _numbers(codes: Tensor, key: QuantKey, dtype: torch.dtype, space: _Space) -> Tensor:
    """What the codes mean without scale and zero point, in a dtype that holds it: int8 as it is."""
    if key.dtype == "int8":
        return codes
    kept = torch.float32 if key.dtype in CODEBOOKS else dtype
    if key.bits == 4:
        table = _pairs(key.dtype, key.zero_points, kept, codes.device)
        return space.look_up(table, codes).view(kept).view(codes.shape[0], -1)
    if not codes.is_contiguous() or codes.shape[1] % 2 or codes.storage_offset() % 2:
        return space.look_up(_singles(kept, codes.device), codes.view(torch.uint8)).view(codes.shape)
    table = _pairs(key.dtype, key.zero_points, kept, codes.device)
    return space.look_up(table, codes.view(torch.uint16)).view(kept).view(codes.shape)


@lru_cache(maxsize=64)
def _pairs(name: str, zero_points: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """For every byte of two codes, or two bytes of one each, both numbers in one word."""
    if name == "float8_e4m3fn":
        single = _singles(dtype, device)
        both = torch.stack((single.repeat(256), single.repeat_interleave(256)), -1)  # the lower byte is the first
    else:
        codes = unpack(torch.arange(256, dtype=torch.uint8, device=device)[:, None], name)
        zero = 0 if zero_points else ZERO_OF.get(name, 0)
        both = decode(codes, name, dtype) if name in CODED else codes.to(dtype) - zero
    return both.contiguous().view(_WORDS[dtype.itemsize]).view(-1)


@lru_cache(maxsize=64)
def _singles(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers of all codes of e4m3."""
    return torch.arange(256, device=device).to(torch.uint8).view(torch.float8_e4m3fn).to(dtype)
