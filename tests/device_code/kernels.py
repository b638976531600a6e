"""Kernels that tests launch."""

import triton
import triton.language as tl

from moe_fx.kernels.triton.activations import backward, forward


@triton.jit
def activation_kernel(
    gate, up, dh, h, dgate, dup, p0, p1, ACT: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    g, u, d = tl.load(gate + i), tl.load(up + i), tl.load(dh + i)
    tl.store(h + i, forward(g, u, p0, p1, ACT, GATED))
    first, second = backward(d, g, u, p0, p1, ACT, GATED)
    tl.store(dgate + i, first)
    tl.store(dup + i, second)
