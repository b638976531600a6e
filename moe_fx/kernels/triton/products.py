"""Rows times their expert's matrix: a program computes up to BM rows of one expert by BN columns.

HOW rows come:
    "sorted"   tiles of ``sorting``
    "apart"    each routed row is a tile of its own: no sorting, for a handful of rows
    "batched"  one batch an expert, with a count each
EVEN: K is a multiple of BK.
DTYPE is that of the products: operands are cast to it as they are read, sums are float32.  PRECISION is ``tl.dot``'s.
"""

import triton
import triton.language as tl

from moe_fx.kernels.triton.activations import forward
from moe_fx.kernels.triton.operands import of_expert, rows_in, swizzled, tile_of, weight_of


@triton.jit
def read(at, inside, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(at)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["tiles"])
def up_kernel(
    x, weights, hidden, kept, gate, up, gate_bias, up_bias, p0, p1, routed, tiles, N, K,
    ACT: tl.constexpr, GATED: tl.constexpr, PAIRED: tl.constexpr,
    HOW: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """hidden [rows, N] = act(x W_gate' + b_gate, x W_up' + b_up), in order of rows.

    x [T, K], or batches of it.  weights [T, k]: of the routing, on the input; None: they are not on it.  kept: None, or
    where the two products go, (Rows, Rows).  A bias is None where there is none, and so is up of an ungated expert and
    where gate holds both, a row of each in turn: PAIRED.
    """
    tile, column = swizzled(tl.program_id(0), tiles, tl.cdiv(N, BN), GROUP)
    expert, first, end = tile_of(tile, routed, HOW, BM)
    if expert < 0:
        return
    row, there, flat = rows_in(first, end, routed, HOW, BM)
    token = flat if HOW == "batched" else flat // routed.top_k
    a_at = x.at + token.to(tl.int64)[:, None] * x.row
    if weights is not None:
        factor = weight_of(weights, flat, routed.top_k)[:, None]
    n = column * BN + tl.arange(0, BN)
    if PAIRED:
        width: tl.constexpr = 2 * BN
        n_in = ((column * width + tl.arange(0, width)) % (2 * N)).to(tl.int64)[None, :]
    else:
        width: tl.constexpr = BN
        n_in = (n % N).to(tl.int64)[None, :]
    gate_at = of_expert(gate, expert) + n_in * gate.out
    acc = tl.zeros((BM, width), tl.float32)
    if up is not None:
        up_at = of_expert(up, expert) + n_in * up.out
        acc_up = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        k_in = k < K
        a = read(a_at + k[None, :] * x.col, k_in[None, :], EVEN)
        if weights is not None:
            a = a.to(tl.float32) * factor
        a = a.to(DTYPE)
        b = read(gate_at + k[:, None] * gate.inner, k_in[:, None], EVEN).to(DTYPE)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if up is not None:
            b = read(up_at + k[:, None] * up.inner, k_in[:, None], EVEN).to(DTYPE)
            acc_up = tl.dot(a, b, acc_up, input_precision=PRECISION)
    if gate_bias is not None:
        acc += tl.load(of_expert(gate_bias, expert) + n_in * gate_bias.out).to(tl.float32)
        if up is not None:
            acc_up += tl.load(of_expert(up_bias, expert) + n_in * up_bias.out).to(tl.float32)
    if PAIRED:
        acc, acc_up = tl.split(tl.reshape(acc, (BM, BN, 2)))
    inside = there[:, None] & (n < N)[None, :]
    where = row.to(tl.int64)[:, None]
    if kept is not None:
        tl.store(kept[0].at + where * kept[0].row + n[None, :] * kept[0].col, acc.to(DTYPE), mask=inside)
        if GATED:
            tl.store(kept[1].at + where * kept[1].row + n[None, :] * kept[1].col, acc_up.to(DTYPE), mask=inside)
    result = forward(acc, acc_up if GATED else acc, p0, p1, ACT, GATED)
    tl.store(hidden.at + where * hidden.row + n[None, :] * hidden.col, result.to(DTYPE), mask=inside)


@triton.jit(do_not_specialize=["tiles"])
def down_kernel(
    hidden, out, down, bias, routed, tiles, N, K,
    ADD: tl.constexpr, HOW: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out [rows, N] = hidden W_down' + b_down: hidden in order of rows, out by flat position; ADD: to what is there."""
    tile, column = swizzled(tl.program_id(0), tiles, tl.cdiv(N, BN), GROUP)
    expert, first, end = tile_of(tile, routed, HOW, BM)
    if expert < 0:
        return
    row, there, flat = rows_in(first, end, routed, HOW, BM)
    a_at = hidden.at + row.to(tl.int64)[:, None] * hidden.row
    n = column * BN + tl.arange(0, BN)
    n_in = (n % N).to(tl.int64)[None, :]
    b_at = of_expert(down, expert) + n_in * down.out
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        k_in = k < K
        a = read(a_at + k[None, :] * hidden.col, k_in[None, :], EVEN).to(DTYPE)
        b = read(b_at + k[:, None] * down.inner, k_in[:, None], EVEN).to(DTYPE)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    if bias is not None:
        acc += tl.load(of_expert(bias, expert) + n_in * bias.out).to(tl.float32)
    place = flat.to(tl.int64)[:, None]
    inside = there[:, None] & (n < N)[None, :]
    out_at = out.at + place * out.row + n[None, :] * out.col
    if ADD:
        acc += tl.load(out_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_at, acc.to(out.at.dtype.element_ty), mask=inside)
