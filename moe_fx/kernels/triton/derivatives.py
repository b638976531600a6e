"""The backward's products: from dy to the up products' gradients, and sums over the rows of an expert.

Rows and constants are those of ``products``; rows come sorted.  What remains of a backward, rows times a matrix from
the other side, is ``products.down_kernel`` on transposed matrices.
"""

import triton
import triton.language as tl

from moe_fx.kernels.triton.activations import backward, forward
from moe_fx.kernels.triton.operands import of_expert, rows_in, swizzled, tile_of, weight_of
from moe_fx.kernels.triton.products import read


@triton.jit(do_not_specialize=["tiles"])
def hidden_kernel(
    dy, weights, gate, up, hidden, dgate, dup, partial, down, p0, p1, routed, tiles, N, K,
    ACT: tl.constexpr, GATED: tl.constexpr, HOW: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """From dy [T, K] and the up products, gate and up [rows, N]: hidden [rows, N] anew, and dgate and dup.

    weights [T, k]: of the routing, on the output; then partial [flat, blocks of columns] gets what each block adds to
    <dy W_down, hidden>, float32.  None: they are on the input, and partial is not read.
    """
    tile, column = swizzled(tl.program_id(0), tiles, tl.cdiv(N, BN), GROUP)
    expert, first, end = tile_of(tile, routed, HOW, BM)
    if expert < 0:
        return
    row, there, flat = rows_in(first, end, routed, HOW, BM)
    token = (flat // routed.top_k).to(tl.int64)
    a_at = dy.at + token[:, None] * dy.row
    n = column * BN + tl.arange(0, BN)
    b_at = of_expert(down, expert) + (n % N).to(tl.int64)[None, :] * down.inner
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        k_in = k < K
        a = read(a_at + k[None, :] * dy.col, k_in[None, :], EVEN).to(DTYPE)
        b = read(b_at + k[:, None] * down.out, k_in[:, None], EVEN).to(DTYPE)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    inside = there[:, None] & (n < N)[None, :]
    where = row.to(tl.int64)[:, None]
    g = tl.load(gate.at + where * gate.row + n[None, :] * gate.col, mask=inside, other=0.0).to(tl.float32)
    u = g
    if GATED:
        u = tl.load(up.at + where * up.row + n[None, :] * up.col, mask=inside, other=0.0).to(tl.float32)
    h = forward(g, u, p0, p1, ACT, GATED).to(DTYPE)
    tl.store(hidden.at + where * hidden.row + n[None, :] * hidden.col, h, mask=inside)
    if weights is not None:
        added = tl.sum(tl.where(inside, acc * h.to(tl.float32), 0.0), 1)
        tl.store(partial.at + flat.to(tl.int64) * partial.row + column, added, mask=there)
        acc *= weight_of(weights, flat, routed.top_k)[:, None]
    first_d, second_d = backward(acc, g, u, p0, p1, ACT, GATED)
    tl.store(dgate.at + where * dgate.row + n[None, :] * dgate.col, first_d.to(DTYPE), mask=inside)
    if GATED:
        tl.store(dup.at + where * dup.row + n[None, :] * dup.col, second_d.to(DTYPE), mask=inside)


@triton.jit
def outer_kernel(
    left, right, weights, matrix, bias, ends, order, top_k, M, N,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """matrix [M, N] of each expert = the sum over its rows of left' right; bias [M] (or None) = that of left.

    LEFT, RIGHT: "sorted", by position in ``order``; "tokens", by token; "weighted", by token and times its weight.
    """
    expert = tl.program_id(2)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    first = tl.where(expert > 0, tl.load(ends + tl.maximum(expert - 1, 0)), 0)
    end = tl.load(ends + expert)
    acc = tl.zeros((BM, BN), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for start in range(first, end, BK):
        row = start + tl.arange(0, BK)
        there = row < end
        flat = tl.load(order + row, mask=there, other=0)
        a = _operand(left, weights, row, flat, top_k, there, m, M, LEFT).to(DTYPE)
        b = _operand(right, weights, row, flat, top_k, there, n, N, RIGHT).to(DTYPE)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
        if bias is not None:
            total += tl.sum(a.to(tl.float32), 0)
    if matrix is not None:
        inside = (m < M)[:, None] & (n < N)[None, :]
        at = of_expert(matrix, expert) + m.to(tl.int64)[:, None] * matrix.out + n.to(tl.int64)[None, :] * matrix.inner
        tl.store(at, acc.to(matrix.like.dtype.element_ty), mask=inside)
    if bias is not None:
        if tl.program_id(1) == 0:
            bias_at = of_expert(bias, expert) + m * bias.out
            tl.store(bias_at, total.to(bias.like.dtype.element_ty), mask=m < M)


@triton.jit
def _operand(rows, weights, row, flat, top_k, there, column, width, KIND: tl.constexpr):
    """[BK, ·] of some rows; zeros where there is none."""
    if KIND == "sorted":
        source = row.to(tl.int64)
    else:
        source = (flat // top_k).to(tl.int64)
    inside = there[:, None] & (column < width)[None, :]
    found = tl.load(rows.at + source[:, None] * rows.row + column[None, :] * rows.col, mask=inside, other=0.0)
    if KIND == "weighted":
        found = found.to(tl.float32) * weight_of(weights, flat, top_k)[:, None]
    return found


@triton.jit
def weights_kernel(
    left, right, partial, bias, ids, dweights, top_k, experts, blocks, H,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dweights [T, k], one program each, 0 for an id outside [0, E).

    With partial [flat, blocks]: its sum, and with a bias <left[t], bias of the expert>, left being dy [T, H].
    Without: <left[flat], right[t]>, left being the gradients of the rows and right x.
    """
    flat = tl.program_id(0).to(tl.int64)
    token = flat // top_k
    slot = flat % top_k
    expert = tl.load(ids.at + token * ids.row + slot * ids.col)
    valid = (expert >= 0) & (expert < experts)
    total = 0.0
    if partial is not None:
        for block in range(blocks):
            total += tl.load(partial.at + flat * partial.row + block, mask=valid, other=0.0)
    if bias is not None:
        vector = of_expert(bias, tl.where(valid, expert, 0).to(tl.int32))
        for start in range(0, H, BLOCK):
            h = start + tl.arange(0, BLOCK)
            a = tl.load(left.at + token * left.row + h * left.col, mask=(h < H) & valid, other=0.0)
            b = tl.load(vector + h * bias.out, mask=(h < H) & valid, other=0.0)
            total += tl.sum(a.to(tl.float32) * b.to(tl.float32))
    if right is not None:
        for start in range(0, H, BLOCK):
            h = start + tl.arange(0, BLOCK)
            a = tl.load(left.at + flat * left.row + h * left.col, mask=(h < H) & valid, other=0.0)
            b = tl.load(right.at + token * right.row + h * right.col, mask=(h < H) & valid, other=0.0)
            total += tl.sum(a.to(tl.float32) * b.to(tl.float32))
    tl.store(dweights.at + token * dweights.row + slot * dweights.col, total.to(dweights.at.dtype.element_ty))
