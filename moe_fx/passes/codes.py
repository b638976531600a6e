"""Codes, scales and zero points by their shapes: which known scheme some tensors may be, and samples of them.

What a scheme is decides ``moe_fx.quant``; here are only the ways in which models store one.  Whoever reads a matrix out
of such tensors (``recipes``, ``wrapped``) compares its values with ``as_quantised`` before anything is believed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import torch
from torch import Tensor

from moe_fx.binding import Quantised
from moe_fx.quant import GroupShape, QuantKey
from moe_fx.reference.formats import CODEBOOKS

_FAR = (1e-30, 1e-12, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 300.0, 1e3, 1e4, 6e4, 1e9, 1e30)
_BLOCKS = (16, 32, 64, 128, 256)
Part = tuple[tuple[int, ...], torch.dtype]  # shape and dtype of what one matrix has of a tensor
_CODES = {torch.int8: "int8", torch.float8_e4m3fn: "float8_e4m3fn"}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_SCALES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float8_e8m0fnu: "float8_e8m0fnu",
    torch.uint8: "float8_e8m0fnu",  # its exponents, as plain bytes
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """codes, scale, zero: positions of the parts.  groups: sizes of the scales of one matrix as stored."""

    key: QuantKey
    codes: int
    scale: int
    zero: int | None
    groups: tuple[int, int]

    def size(self, at: int, a: int, b: int) -> tuple[int, int]:
        """Of the part at that position, for a matrix [a, b]."""
        return (a, b * self.key.bits // 8) if at == self.codes else self.groups

    def dtype(self, at: int, stored: torch.dtype) -> torch.dtype:
        """As what the part at that position is read."""
        if at == self.codes and self.key.bits < 8:
            return torch.uint8
        return torch.float8_e8m0fnu if at == self.scale and stored is torch.uint8 else stored


def candidates(parts: Sequence[Part], a: int, b: int) -> Iterator[Recipe]:
    """Schemes that the parts of a matrix [a, b] allow: codes, a scale and perhaps zero points (which may be there and
    not be used), and nothing else."""
    for at, (shape, dtype) in enumerate(parts):
        n = prod(shape)
        names = [_CODES[dtype]] if n == a * b and dtype in _CODES else []
        if (dtype is torch.uint8 and 2 * n == a * b) or (dtype is torch.int32 and 8 * n == a * b):
            names = ["int4", "float4_e2m1", *(("nf4", "fp4_bnb") if dtype is torch.uint8 else ())]
        rest = [i for i in range(len(parts)) if i != at]
        for name in names:
            for scale in (i for i in rest if parts[i][1] in (_FLOATS if name in CODEBOOKS else _SCALES)):
                zeros = [i for i in rest if i != scale]
                if len(zeros) > 1 or any(parts[i][1] not in (torch.uint8, torch.int8) for i in zeros):
                    continue
                if zeros and prod(parts[zeros[0]][0]) != prod(parts[scale][0]):
                    continue
                for groups in _groups(parts[scale][0], a, b):
                    for group in product(*(_extents(n, m) for n, m in zip((a, b), groups, strict=True))):
                        for zero in (None,) if name in CODEBOOKS else (*zeros, None):
                            extent, of_scale = GroupShape(*group), _SCALES[parts[scale][1]]
                            key = QuantKey(name, extent, of_scale, zero_points=zero is not None)  # type: ignore[arg-type]
                            yield Recipe(key, at, scale, zero, groups)


def _extents(size: int, groups: int) -> list[int]:
    """What a group of so many may be: equal parts, or a power of two with a smaller one at the end."""
    if groups == 1:
        return [-1]
    equal = -(-size // groups)
    return [equal, *(p for p in _BLOCKS if p != equal and -(-size // p) == groups)]


def _groups(shape: tuple[int, ...], a: int, b: int) -> Iterator[tuple[int, int]]:
    """Ways to read the shape of scales as one for so many groups of rows and of columns."""
    sizes = tuple(s for s in shape if s != 1)
    if not sizes:
        yield 1, 1
    elif len(sizes) == 1:
        flat = (a, sizes[0] // a)  # row by row, as bitsandbytes stores them
        yield from ((m, n) for m, n in ((sizes[0], 1), (1, sizes[0])) if m <= a and n <= b)
        if sizes[0] > a and sizes[0] % a == 0 and b % flat[1] == 0:
            yield flat
    elif len(sizes) == 2 and sizes[0] <= a and sizes[1] <= b:
        yield sizes[0], sizes[1]


def draw(parts: Sequence[Part], seed: int = 0) -> list[Tensor]:
    """A sample: every code there is, scales over many decades and of both signs; no NaN."""
    generator = torch.Generator().manual_seed(seed)
    most = max(prod(shape) for shape, _ in parts)
    return [_draw(list(shape), dtype, prod(shape) * 8 >= most, generator) for shape, dtype in parts]


def draw_special(parts: Sequence[Part], constants: Sequence[float] = ()) -> list[Tensor]:
    """A sample of what code may ask for: scales of 0, NaN, 1, far too small or large ones, and those that it names;
    every exponent but that of NaN (of plain bytes the smallest); codes of NaN; zero points of four bits."""
    generator = torch.Generator().manual_seed(7)
    most = max(prod(shape) for shape, _ in parts)
    return [_special(list(shape), dtype, prod(shape) * 8 >= most, constants, generator) for shape, dtype in parts]


def _special(
    shape: list[int], dtype: torch.dtype, codes: bool, constants: Sequence[float], generator: torch.Generator
) -> Tensor:
    if dtype is torch.float8_e4m3fn:
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).view(dtype)
    if dtype is torch.float8_e8m0fnu:
        return torch.randint(0, 255, shape, generator=generator, dtype=torch.uint8).view(dtype)
    if dtype is torch.uint8 and not codes:  # exponents, or zero points
        return torch.randint(0, 16, shape, generator=generator, dtype=dtype)
    if not dtype.is_floating_point:
        return _draw(shape, dtype, codes, generator)
    named = [n for c in constants for n in (c, c * (1 - 2**-6), c * (1 + 2**-6))]
    values = torch.tensor([0.0, 1.0, torch.nan, *_FAR, *named], dtype=torch.float64)
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return (sign * values[torch.randint(0, len(values), shape, generator=generator)]).to(dtype)


def _draw(shape: list[int], dtype: torch.dtype, codes: bool, generator: torch.Generator) -> Tensor:
    if dtype is torch.float8_e4m3fn:
        bits = torch.randint(0, 254, shape, generator=generator)
        return (bits + (bits >= 127)).to(torch.uint8).view(dtype)
    if dtype is torch.float8_e8m0fnu or (dtype is torch.uint8 and not codes):  # exponents, or zero points
        return torch.randint(64, 192, shape, generator=generator, dtype=torch.uint8).view(dtype)
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        return torch.randint(info.min, info.max + 1, shape, generator=generator, dtype=dtype)
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return (sign * torch.exp2(torch.rand(shape, generator=generator) * 20 - 12)).to(dtype)


def as_quantised(recipe: Recipe, parts: Sequence[Tensor], lead: tuple[int, ...], a: int, b: int) -> Quantised:
    """The parts of one matrix, or of ``lead`` ones, as codes, scale and zero points."""

    def read(at: int) -> Tensor:
        part = parts[at]
        return part.view(recipe.dtype(at, part.dtype)).reshape(*lead, *recipe.size(at, a, b))

    zero = None if recipe.zero is None else read(recipe.zero)
    return Quantised(recipe.key, read(recipe.codes), read(recipe.scale), zero)
