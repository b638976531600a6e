"""Quantisation by hand: tables of numbers, loops over groups, nothing of ``moe_fx.reference``.

Enters: a matrix of Python floats in a numpy array and a QuantKey.  Leaves: codes, scales and zero points, what they
stand for, and the codes that lie in the bytes of a ``Quantised``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from moe_fx import quant
from moe_fx.binding import Quantised
from moe_fx.quant import GroupShape, QuantKey, int_group

NAMED: dict[str, QuantKey] = {name: key for name, key in vars(quant).items() if isinstance(key, QuantKey)}
INTEGERS: dict[str, QuantKey] = {
    "INT4_32": int_group(4, 32),
    "INT4_128_ZERO": int_group(4, 128, zero_points=True),
    "INT4_CHANNEL_F16": int_group(4, -1, scale="float16"),
    "INT4_32_ZERO_F32": int_group(4, 32, zero_points=True, scale="float32"),
    "INT8_32": int_group(8, 32),
    "INT8_CHANNEL_ZERO": int_group(8, -1, zero_points=True),
    "INT8_32_ZERO_F16": int_group(8, 32, zero_points=True, scale="float16"),
    "INT8_COLUMN": QuantKey("int8", GroupShape(-1, 1)),
    "INT8_BLOCK_3x5": QuantKey("int8", GroupShape(3, 5)),
    "INT8_DYNAMIC_ZERO": QuantKey("int8", GroupShape(1, -1), static=False, zero_points=True),
}
BY_BOOK: dict[str, QuantKey] = {
    "NF4_CHANNEL_BF16": QuantKey("nf4", GroupShape(1, -1), "bfloat16"),
    "NF4_BLOCK_F16": QuantKey("nf4", GroupShape(3, 8), "float16"),
    "FP4_BNB_32_E8M0": QuantKey("fp4_bnb", GroupShape(1, 32), "float8_e8m0fnu"),
    "FP4_BNB_DYNAMIC": QuantKey("fp4_bnb", GroupShape(-1, -1), static=False),
}
KEYS = NAMED | INTEGERS | BY_BOOK

# from the tables of MX 1.0, section 5.3: the numbers of the codes 0, 1, 2, … without a sign
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
E2M3 = [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875]
E2M3 += [2, 2.25, 2.5, 2.75, 3, 3.25, 3.5, 3.75, 4, 4.5, 5, 5.5, 6, 6.5, 7, 7.5]
E3M2 = [0, 0.0625, 0.125, 0.1875, 0.25, 0.3125, 0.375, 0.4375, 0.5, 0.625, 0.75, 0.875, 1, 1.25, 1.5, 1.75]
E3M2 += [2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28]
E4M3 = [i / 512 for i in range(8)] + [(8 + i) / 8 * 2.0**e for e in range(-6, 9) for i in range(8)][:-1]
TABLES = {"float8_e4m3fn": E4M3, "float4_e2m1": E2M1, "float6_e3m2": E3M2, "float6_e2m3": E2M3}

# the numbers of all codes.  nf4: QLoRA (arXiv 2305.14314), appendix E, where float32 numbers stand in full.  fp4_bnb:
# what bitsandbytes 0.50.2 dequantises the sixteen codes to under a scale of 1, in twelfths, which it keeps in float32
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
NF4 += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
NF4 += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
FP4_BNB = [float(np.float32(n / 12)) for n in (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3)]
BOOKS = {"nf4": NF4, "fp4_bnb": FP4_BNB}


def numbers(key: QuantKey, zero: int = 0) -> dict[int, float]:
    """Code → what it stands for before the scale, for all codes that ``quantise`` may give."""
    if key.dtype in TABLES:
        table, sign = TABLES[key.dtype], {8: 128, 4: 8, 6: 32}[key.bits]
        return dict(enumerate(table)) | {c + sign: -v for c, v in enumerate(table)}
    if key.dtype in BOOKS:
        return {BOOKS[key.dtype].index(v): v for v in BOOKS[key.dtype]}  # the first of two zeros
    if key.zero_points:
        return {c: float(c - zero) for c in (range(16) if key.dtype == "int4" else range(-128, 128))}
    middle = 8 if key.dtype == "int4" else 0
    return {c: float(c - middle) for c in (range(1, 16) if key.dtype == "int4" else range(-127, 128))}


def rounded_scale(value: float, name: str) -> float:
    """value > 0 → the nearest of a scale's dtype but 0, through float32 for the 16-bit ones."""
    if name == "float8_e4m3fn":
        if value >= 448:
            return 448.0
        best = min(abs(v - value) for v in E4M3)
        found = [c for c, v in enumerate(E4M3) if abs(v - value) == best]
        return E4M3[next((c for c in found if c % 2 == 0), found[0])] or 2.0**-9
    if name == "float16":
        return float(np.float16(np.float32(min(value, 65504.0)))) or 2.0**-24
    single = np.float32(value)
    if name == "float32":
        return float(single) or 2.0**-149
    bits = int(single.view(np.uint32))  # bfloat16 is the upper half; the lower half decides, a half goes to even
    upper, lower = bits >> 16, bits & 0xFFFF
    upper += lower > 0x8000 or (lower == 0x8000 and upper % 2 == 1)
    return float(np.uint32(upper << 16).view(np.float32)) or 2.0**-133


def group_scale(largest: float, limit: float, name: str) -> float:
    """The scale of a group from its largest magnitude."""
    if largest == 0:
        return 1.0
    if name != "float8_e8m0fnu":
        return rounded_scale(largest / limit, name)
    exponent = -200
    while Fraction(2) ** (exponent + 1) <= Fraction(largest):
        exponent += 1
    wanted = exponent - int(math.log2(limit))
    return 2.0 ** max(min(wanted, 127), -127)


def nearest(steps: np.ndarray, key: QuantKey, zero: int = 0) -> np.ndarray:
    """steps [...] → the code of the nearest number, by trying all; of two as near the even one.

    Integers are even as numbers, floats as codes.  A zero has the sign of what it comes from.
    """
    values = numbers(key, zero)
    codes = list(values)
    inside = np.clip(steps, min(values.values()), max(values.values()))  # far out, distances would look alike
    gaps = np.abs(inside[..., None] - np.array([values[c] for c in codes]))
    near = gaps == gaps.min(-1, keepdims=True)
    odd = np.array([c % 2 if key.dtype in TABLES | BOOKS else values[c] % 2 for c in codes])
    found = np.array(codes)[np.where(near, odd, 2).argmin(-1)]
    zeros = [c for c in codes if values[c] == 0]
    return np.where(np.isin(found, zeros), np.where(np.signbit(steps), max(zeros), min(zeros)), found)


@dataclass(frozen=True, slots=True)
class Held:
    """A matrix [rows, cols] by hand: codes and values [rows, cols], scale and zero [groups], global_scale."""

    codes: np.ndarray
    values: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    global_scale: float


def by_hand(matrix: np.ndarray, key: QuantKey, scale: float | None = None, global_scale: float | None = None) -> Held:
    """matrix [rows, cols] float64, finite; scale: given, one for all of it."""
    rows, cols = matrix.shape
    limit = {"float8_e4m3fn": 448, "float4_e2m1": 6, "float6_e3m2": 28, "float6_e2m3": 7.5, "int8": 127, "int4": 7}
    limit |= {"nf4": 1, "fp4_bnb": 1}
    whole = 1.0
    if key.global_scale:
        whole = group_scale(float(np.abs(matrix).max()), 448 * 6, "float32") if global_scale is None else global_scale
    row, col = (rows if key.group.row == -1 else key.group.row), (cols if key.group.col == -1 else key.group.col)
    down, across = range(0, rows, row), range(0, cols, col)
    codes, values = np.zeros(matrix.shape, int), np.zeros(matrix.shape)
    scales, zeros = np.zeros((len(down), len(across))), np.zeros((len(down), len(across)), int)
    for (i, top), (j, left) in ((a, b) for a in enumerate(down) for b in enumerate(across)):
        place = slice(top, top + row), slice(left, left + col)
        part, zero = matrix[place], 0
        if scale is not None:
            step = scale
        elif key.zero_points:
            low, high = min(float(part.min()), 0.0), max(float(part.max()), 0.0)
            step = group_scale(high - low, 15 if key.dtype == "int4" else 255, key.scale)
            first, last = (0, 15) if key.dtype == "int4" else (-128, 127)
            zero = max(first, min(last, first + round(-low / step)))
        else:
            step = group_scale(float(np.abs(part).max()) / whole, limit[key.dtype], key.scale)
        table = numbers(key, zero)
        scales[i, j], zeros[i, j] = step, zero
        codes[place] = nearest(part / (whole * step), key, zero)
        values[place] = whole * step * np.vectorize(table.__getitem__, otypes=[float])(codes[place])
    return Held(codes, values, scales, zeros, whole)


def codes_of(q: Quantised) -> np.ndarray:
    """The codes in the bytes of one matrix: a row is one long number, lowest bits first, those of a book highest."""
    assert isinstance(q.codes, Tensor)
    if q.codes.dtype == torch.int8:
        return q.codes.numpy().astype(int)
    raw, bits = q.codes.view(torch.uint8).numpy(), q.key.bits
    count = raw.shape[1] * 8 // bits
    first = "big" if q.key.dtype in BOOKS else "little"
    longs = [int.from_bytes(row.tobytes(), first) for row in raw]
    places = range(count)[::-1] if q.key.dtype in BOOKS else range(count)
    return np.array([[(n >> (bits * i)) % 2**bits for i in places] for n in longs]).reshape(len(raw), count)


def values_of(q: Quantised) -> np.ndarray:
    """What one matrix stands for, by the formulas of ``quant`` and the tables here, in float64."""
    codes = codes_of(q)
    (rows, cols), (down, across) = codes.shape, tuple(q.scale.shape)
    row, col = (
        (rows if q.key.group.row == -1 else q.key.group.row),
        (cols if q.key.group.col == -1 else q.key.group.col),
    )
    scale, whole = q.scale.double().numpy(), 1.0 if q.global_scale is None else float(q.global_scale)
    values = np.zeros(codes.shape)
    for i in range(down):
        for j in range(across):
            place = slice(i * row, (i + 1) * row), slice(j * col, (j + 1) * col)
            table = numbers(q.key, 0 if q.zero is None else int(q.zero[i, j]))
            values[place] = whole * scale[i, j] * np.vectorize(table.__getitem__, otypes=[float])(codes[place])
    return values
