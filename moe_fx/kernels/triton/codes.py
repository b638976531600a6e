"""Codes in registers: tiles of weights become numbers, rows become codes.

Weights lie as in ``binding.Quantised``; keys are those of ``quant``, and what codes mean is ``reference.quantise``, to
the bit where nothing is said.  All is computed in float32 by arithmetic on bits: no table is read, and a GPU that knows
no float8_e4m3fn does as well.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_fx.binding import Quantised, Vectors
from moe_fx.kernels.triton import operands
from moe_fx.kernels.triton.operands import of_expert


class Bank(NamedTuple):
    """E matrices [out, in] of codes, of which a product takes the rows from ``first`` on.

    codes: [E, out, bytes of a row].  scale, zero: [E, groups of rows, groups of columns]; e8m0 scales are bytes.  bias:
    ``Vectors``.  name: of the codes; rows, cols: of a group, 0 the whole extent.  What there is not is None.
    """

    codes: Any
    scale: Any
    zero: Any
    bias: Any
    first: int
    name: tl.constexpr
    rows: tl.constexpr
    cols: tl.constexpr


def bank(q: Quantised, bias: Vectors | None, first: int = 0, typed: bool = False) -> Bank:
    """typed: codes of float8_e4m3fn come as such, for products of codes, not as bytes."""
    eight = q.key.dtype == "float8_e4m3fn"
    codes = q.codes if typed or not eight else _bytes(q.codes)
    scale = _bytes(q.scale) if q.key.scale == "float8_e8m0fnu" else q.scale
    rows, cols = (max(size, 0) for size in q.key.group)
    return Bank(
        operands.matrices(codes),
        operands.matrices(scale),
        None if q.zero is None else operands.matrices(q.zero),
        None if bias is None else operands.vectors(bias),
        first,
        tl.constexpr(q.key.dtype),
        tl.constexpr(rows),
        tl.constexpr(cols),
    )


def _bytes(found: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    return [t.view(torch.uint8) for t in found] if isinstance(found, list) else found.view(torch.uint8)


@triton.jit
def rows_of(bank, expert, n):
    """Pointers [BN, 1] to the first codes of rows n of the bank."""
    row = bank.first + n
    return of_expert(bank.codes, expert) + row.to(tl.int64)[:, None] * bank.codes.out


@triton.jit
def groups_of(held, bank, expert, n):
    """Pointers [BN, 1] to the first scales (or zero points: held) of rows n of the bank."""
    group = n * 0
    if bank.rows > 0:
        group = (bank.first + n) // bank.rows
    return of_expert(held, expert) + group.to(tl.int64)[:, None] * held.out


@triton.jit
def power(code):
    """float32 of an e8m0 code: 2**(code - 127), 255 is NaN."""
    bits = tl.where(code == 0, 0x00400000, code.to(tl.int32) << 23)
    return tl.where(code == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def value(found):
    """Scales, or bytes that are e8m0 scales, as float32."""
    if found.dtype == tl.uint8:
        return power(found)
    else:
        return found.to(tl.float32)


@triton.jit
def numbers(code, NAME: tl.constexpr, ZERO: tl.constexpr):
    """What codes mean before scale and zero point, float32.  ZERO: zero points follow."""
    if NAME == "float8_e4m3fn":
        wide = code.to(tl.int32)
        bits = ((wide & 0x7F) << 20) | ((wide & 0x80) << 24)
        number = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120, between the two exponents' biases
        return tl.where((wide & 0x7F) == 0x7F, float("nan"), number)
    elif NAME == "float4_e2m1":
        wide = code.to(tl.int32)
        bits = ((wide & 7) << 22) | ((wide & 8) << 28)
        return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2**126
    elif NAME == "int4" and not ZERO:
        return (code.to(tl.int32) - 8).to(tl.float32)
    else:
        return code.to(tl.float32)


@triton.jit
def weights_of(bank, codes_at, scale_at, zero_at, start, K, DTYPE: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr):
    """[BN, BK] numbers of the bank from column ``start`` on, in DTYPE.  Without the scale where it is one for a whole
    row: that multiplies the product."""
    BN: tl.constexpr = codes_at.shape[0]
    if bank.name == "int4" or bank.name == "float4_e2m1":
        at = start // 2 + tl.arange(0, BK // 2)
        pair = _read(codes_at + at[None, :] * bank.codes.inner, (at < K // 2)[None, :], EVEN)
        code = tl.interleave(pair & 15, pair >> 4)
    else:
        at = start + tl.arange(0, BK)
        code = _read(codes_at + at[None, :] * bank.codes.inner, (at < K)[None, :], EVEN)
    number = numbers(code, bank.name, bank.zero is not None)
    if bank.cols > 0 or bank.zero is not None:
        SIZE: tl.constexpr = bank.cols if bank.cols > 0 and bank.cols < BK else BK
        column = start + tl.arange(0, BK // SIZE) * SIZE
        group = column * 0
        if bank.cols > 0:
            group = column // bank.cols
        number = tl.reshape(number, (BN, BK // SIZE, SIZE))
        inside = (column < K)[None, :]
        if bank.zero is not None:
            zero = _read(zero_at + group[None, :] * bank.zero.inner, inside, EVEN)
            number -= zero.to(tl.float32)[:, :, None]
        if bank.cols > 0:
            number *= value(_read(scale_at + group[None, :] * bank.scale.inner, inside, EVEN))[:, :, None]
        number = tl.reshape(number, (BN, BK))
    return number.to(DTYPE)


@triton.jit
def _read(at, inside, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(at)
    else:
        return tl.load(at, mask=inside, other=0)


@triton.jit
def quotient(x, scale):
    """x / scale, rounded to odd: rounded once more, to fewer digits, it is as if it had been rounded once."""
    q = tl.div_rn(x, scale)
    left = x.to(tl.float64) - q.to(tl.float64) * scale.to(tl.float64)  # exact
    bits = q.to(tl.int32, bitcast=True)
    step = tl.where((left > 0) == (q >= 0), 1, -1)
    near = (tl.abs(q) > 0.0004) & (tl.abs(q) < 1024)  # where codes have their ends
    return tl.where(near & (left != 0) & (bits & 1 == 0), bits + step, bits).to(tl.float32, bitcast=True)


@triton.jit
def encoded(q, NAME: tl.constexpr):
    """Codes of float32 numbers, the nearest, of two as near the even one; past the ends the end."""
    if NAME == "float8_e4m3fn":
        size = tl.where(q != q, q, tl.minimum(tl.abs(q), 448.0))
        bits = size.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        small = (size + 16384.0).to(tl.int32, bitcast=True) & 15  # 2**14: its last digit is 2**-9, the smallest code
        code = tl.where(size < 0.015625, small, normal) | ((q.to(tl.int32, bitcast=True) >> 24) & 0x80)
        return tl.where(q != q, 0x7F, code).to(tl.uint8)
    else:
        tl.static_assert(NAME == "int8")
        whole = tl.minimum(tl.maximum(q, -127.0), 127.0)
        whole = (whole + 12582912.0) - 12582912.0  # 1.5 * 2**23: no digit after the point is left
        return tl.where(q != q, 0.0, whole).to(tl.int8)


@triton.jit
def scale_of(x, LIMIT: tl.constexpr):
    """float32 [n]: of groups [n, size] of float32 numbers, so that the largest becomes LIMIT."""
    size = tl.abs(x)
    largest = tl.max(size, 1)
    smallest = tl.full(largest.shape, 1, tl.int32).to(tl.float32, bitcast=True)
    scale = tl.maximum(tl.div_rn(largest, tl.full(largest.shape, LIMIT, tl.float32)), smallest)
    scale = tl.where(largest == 0, 1.0, scale)
    broken = tl.max(tl.where(size < float("inf"), 0, 1), 1)  # NaN is not less either
    return tl.where(broken > 0, float("nan"), scale)
