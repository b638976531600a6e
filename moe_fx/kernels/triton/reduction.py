"""The k results of a token become one row; a norm of each result comes before."""

import triton
import triton.language as tl


@triton.jit
def reduce_kernel(
    results, weights, ids, norm, y, top_k, experts, H, eps,
    NORM: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y [T, H] = sum over k of weights[t, k] * norm(results[t * k + slot]), in float32; ids outside [0, E) add nothing.

    weights None: ones.  norm: weight [H] or None; with one, WIDE covers the row.  DTYPE: that of the results, to which
    a norm rounds.
    """
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    inside = h < H
    acc = tl.zeros((WIDE,), tl.float32)
    if norm is not None:
        g = tl.load(norm + h, mask=inside, other=0.0).to(tl.float32)
    for slot in range(top_k):
        found = tl.load(ids.at + token * ids.row + slot * ids.col)
        valid = (found >= 0) & (found < experts)
        row = tl.load(results.at + (token * top_k + slot) * results.row + h, mask=inside & valid, other=0.0)
        row = row.to(tl.float32)
        if norm is not None:
            row = normalised(row, g, H, eps, NORM, DTYPE)
        if weights is not None:
            w_at = weights.at + token * weights.row + slot * weights.col
            row *= tl.load(w_at, mask=valid, other=0.0).to(tl.float32)
        acc += row
    tl.store(y.at + token * y.row + h * y.col, acc.to(y.at.dtype.element_ty), mask=inside)


@triton.jit
def normalised(row, g, H, eps, NORM: tl.constexpr, DTYPE: tl.constexpr):
    """RMSNorm of one result, float32 in and out; g: its weight.  See ``spec.ExpertSpec``."""
    if NORM == "rms_input_scaled":
        row = (row * (1 + g)).to(DTYPE).to(tl.float32)
    row *= tl.rsqrt(tl.sum(row * row) / H + eps)
    if NORM == "rms":
        row *= g
    elif NORM == "rms_plus_one":
        row *= 1 + g
    return row.to(DTYPE).to(tl.float32)
