"""Products with codes; tiles, HOW, EVEN, DTYPE and PRECISION are those of ``products``.

Rows that are floats: codes become numbers of DTYPE in registers, with the scales of their groups.  Rows that are codes:
codes are multiplied, in float32 or int32, and the scales of both sides follow, after each group or at the end.
A scale that is one for a whole row of a matrix always follows at the end.
"""

import triton
import triton.language as tl

from moe_fx.kernels.triton.activations import forward
from moe_fx.kernels.triton.codes import encoded, groups_of, quotient, rows_of, scale_of, value, weights_of
from moe_fx.kernels.triton.operands import flat_of, of_expert, rows_in, swizzled, tile_of, weight_of
from moe_fx.kernels.triton.products import read


@triton.jit
def places(bank, expert, n):
    """Where rows n of the bank begin, [BN, 1] each: codes, scales, zero points (scales again where there are none)."""
    scale_at = groups_of(bank.scale, bank, expert, n)
    if bank.zero is not None:
        zero_at = groups_of(bank.zero, bank, expert, n)
    else:
        zero_at = scale_at
    return rows_of(bank, expert, n), scale_at, zero_at


@triton.jit
def multiplied(
    acc, a, a_scale_at, scales, bank, at, start, K,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """acc + a W', from column ``start`` on.  scales: None, or those of rows that are codes."""
    if scales is None:
        b = weights_of(bank, at[0], at[1], at[2], start, K, DTYPE, BK, EVEN)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    else:
        k = start + tl.arange(0, BK)
        b = tl.trans(read(at[0] + k[None, :] * bank.codes.inner, (k < K)[None, :], EVEN))
        if bank.name == "int8":
            acc = tl.dot(a, b, acc, out_dtype=tl.int32)
        elif bank.cols > 0:
            group = start // bank.cols
            both = tl.load(a_scale_at + group * scales.col) * tl.trans(value(tl.load(at[1] + group * bank.scale.inner)))
            acc += tl.dot(a, b) * both
        else:
            acc += tl.dot(a, b)  # not into acc: Hopper's own sums of e4m3 have 14 bits
    return acc


@triton.jit
def finished(acc, a_scale_at, scales, bank, expert, n, at):
    """float32: the scales that follow at the end, and the bias."""
    acc = acc.to(tl.float32)
    if bank.cols == 0:
        if scales is not None:
            acc *= tl.load(a_scale_at)
        acc *= tl.trans(value(tl.load(at[1])))
    if bank.bias is not None:
        acc += tl.load(of_expert(bank.bias, expert) + (bank.first + n)[None, :] * bank.bias.out).to(tl.float32)
    return acc


@triton.jit
def zeros(BM: tl.constexpr, BN: tl.constexpr, scales, bank):
    if bank.name == "int8" and scales is not None:
        return tl.zeros((BM, BN), tl.int32)
    else:
        return tl.zeros((BM, BN), tl.float32)


@triton.jit(do_not_specialize=["tiles"])
def up_codes_kernel(
    x, scales, weights, hidden, share, gate, up, p0, p1, routed, tiles, N, K,
    ACT: tl.constexpr, GATED: tl.constexpr, PAIRED: tl.constexpr,
    HOW: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """hidden [rows, N] = act(x W_gate' + b_gate, x W_up' + b_up), in order of rows.

    x [T, K] of floats; or codes with float32 ``scales`` [rows of x, groups].  share: routed rows that have a row of x
    together: k, or 1.  weights [T, k]: as of ``products.up_kernel``, for floats alone.  gate, up: banks, up None of an
    ungated expert and where gate holds both, a row of each in turn: PAIRED.
    """
    tile, column = swizzled(tl.program_id(0), tiles, tl.cdiv(N, BN), GROUP)
    expert, first, end = tile_of(tile, routed, HOW, BM)
    if expert < 0:
        return
    row, there, flat = rows_in(first, end, routed, HOW, BM)
    mine = (flat // share).to(tl.int64)[:, None]
    a_at = x.at + mine * x.row
    scale_at = a_at  # not read
    if scales is not None:
        scale_at = scales.at + mine * scales.row
    if weights is not None:
        factor = weight_of(weights, flat, routed.top_k)[:, None]
    n = column * BN + tl.arange(0, BN)
    if PAIRED:
        width: tl.constexpr = 2 * BN
        n_in = (column * width + tl.arange(0, width)) % (2 * N)
    else:
        width: tl.constexpr = BN
        n_in = n % N
    APART: tl.constexpr = GATED and not PAIRED  # a tuple with fields that are None cannot be asked whether it is None
    at = places(gate, expert, n_in)
    acc = zeros(BM, width, scales, gate)
    if APART:
        up_at = places(up, expert, n_in)
        acc_up = zeros(BM, BN, scales, up)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        a = read(a_at + k[None, :] * x.col, (k < K)[None, :], EVEN)
        if weights is not None:
            a = a.to(tl.float32) * factor
        if scales is None:
            a = a.to(DTYPE)
        acc = multiplied(acc, a, scale_at, scales, gate, at, start, K, DTYPE, PRECISION, BK, EVEN)
        if APART:
            acc_up = multiplied(acc_up, a, scale_at, scales, up, up_at, start, K, DTYPE, PRECISION, BK, EVEN)
    g = finished(acc, scale_at, scales, gate, expert, n_in, at)
    if APART:
        u = finished(acc_up, scale_at, scales, up, expert, n_in, up_at)
    elif PAIRED:
        g, u = tl.split(tl.reshape(g, (BM, BN, 2)))
    else:
        u = g
    result = forward(g, u, p0, p1, ACT, GATED)
    inside = there[:, None] & (n < N)[None, :]
    tl.store(
        hidden.at + row.to(tl.int64)[:, None] * hidden.row + n[None, :] * hidden.col, result.to(DTYPE), mask=inside
    )


@triton.jit(do_not_specialize=["tiles"])
def down_codes_kernel(
    hidden, scales, out, down, routed, tiles, N, K,
    HOW: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out [rows, N] = hidden W_down' + b_down: hidden, and ``scales`` where it is codes, in order of rows, out by flat
    position."""
    tile, column = swizzled(tl.program_id(0), tiles, tl.cdiv(N, BN), GROUP)
    expert, first, end = tile_of(tile, routed, HOW, BM)
    if expert < 0:
        return
    row, there, flat = rows_in(first, end, routed, HOW, BM)
    mine = row.to(tl.int64)[:, None]
    a_at = hidden.at + mine * hidden.row
    scale_at = a_at  # not read
    if scales is not None:
        scale_at = scales.at + mine * scales.row
    n = column * BN + tl.arange(0, BN)
    at = places(down, expert, n % N)
    acc = zeros(BM, BN, scales, down)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        a = read(a_at + k[None, :] * hidden.col, (k < K)[None, :], EVEN)
        acc = multiplied(acc, a, scale_at, scales, down, at, start, K, DTYPE, PRECISION, BK, EVEN)
    result = finished(acc, scale_at, scales, down, expert, n % N, at)
    place = flat.to(tl.int64)[:, None]
    inside = there[:, None] & (n < N)[None, :]
    tl.store(out.at + place * out.row + n[None, :] * out.col, result.to(out.at.dtype.element_ty), mask=inside)


@triton.jit
def round_kernel(
    x, weights, given, codes, scales, routed, K, groups,
    EACH: tl.constexpr, NAME: tl.constexpr, LIMIT: tl.constexpr, APART: tl.constexpr, HOW: tl.constexpr,
    DTYPE: tl.constexpr, COUNT: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """codes [rows, K] and scales [rows, groups] of rows of floats, as ``reference.quantise`` has them, COUNT groups of
    SIZE numbers a program.

    APART: row r of codes is the routed row r, of the token r // k, times its weight where weights [T, k] are given.
    given: the scale, or with EACH those of the experts [E]; None: it comes from the values.
    """
    row = tl.program_id(0)
    wide = row.to(tl.int64)
    group = tl.program_id(1) * COUNT + tl.arange(0, COUNT)
    k = group[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    source = wide // routed.top_k if APART else wide
    number = tl.load(x.at + source * x.row + k * x.col, mask=k < K, other=0.0).to(tl.float32)
    if weights is not None:
        number *= weight_of(weights, row, routed.top_k)
    number = number.to(DTYPE).to(tl.float32)
    if given is None:
        scale = scale_of(number, LIMIT)
    else:
        if EACH:
            flat = flat_of(row, routed, HOW)
            id_at = (flat // routed.top_k).to(tl.int64) * routed.ids_t + (flat % routed.top_k) * routed.ids_k
            found = tl.load(routed.ids + id_at)
            given += tl.where((found >= 0) & (found < routed.experts), found, 0)
        scale = tl.zeros((COUNT,), tl.float32) + tl.load(given)
    code = encoded(quotient(number, scale[:, None]), NAME)
    tl.store(codes.at + wide * codes.row + k, code, mask=k < K)
    tl.store(scales.at + wide * scales.row + group, scale, mask=group < groups)
