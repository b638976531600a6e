"""The launches of a backward, without norms: nothing waits, an expert that no row reached gets zeros.

dy → dhidden = dy W2, and at once the activation's derivative → dx = d_up W13 summed over the slots, dW13 = d_up' x and
dW2 = (w dy)' hidden over the rows of each expert.  With the routing weight on the output its gradient is taken between
the projections, <dy W2, hidden> + <dy, b2>, so that no down product is computed again; on the input it is <d row, x>.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
from torch import Tensor

from moe_fx.binding import Experts, Vectors
from moe_fx.kernels.triton import launch, operands
from moe_fx.kernels.triton.derivatives import hidden_kernel, outer_kernel, weights_kernel
from moe_fx.kernels.triton.launch import DTYPES, Held, Job
from moe_fx.kernels.triton.products import down_kernel
from moe_fx.reference.experts import compute_dtype
from moe_fx.spec import MoESpec

BLOCK = 1024  # columns of a row that one step of a sum takes
NARROW = 64  # columns of a tile after which five such tiles are held at once
SQUARE = (64, 64, 32)  # rows, columns and inner of a tile of a weight's gradient; "not yet tuned on a GPU"


def experts_backward(
    dy: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    experts: Experts,
    spec: MoESpec,
    grads: Experts | None,
    saved: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """As ``kernels.experts.backward.experts_backward``; ids not empty, no norm."""
    e, on_input = spec.expert, spec.combine.weight_on == "input"
    dtype = compute_dtype(experts, e, x.dtype)
    job = launch.listed(ids, spec, dtype, sort=True)
    size, factor = ids.numel(), weights if on_input else None
    hidden = x.new_empty((size, e.intermediate), dtype=dtype)
    if not saved:
        saved = [x.new_empty((size, matrices[0].shape[0]), dtype=dtype) for matrices in experts.up]
        launch.up_products(job, x, factor, experts, hidden, saved)
    dups = [torch.empty_like(s) for s in saved]
    partial = _hidden(job, dy, None if on_input else weights, experts, saved, hidden, dups)
    drows = x.new_empty((size, e.hidden), dtype=dtype)
    _rows(job, dups, experts, drows)
    dx, dweights = x.new_empty(x.shape), weights.new_empty(weights.shape)
    launch.reduce(drows, factor, ids, spec, None, dx)
    bias = experts.down_bias if partial is not None else None
    weights_kernel[(size,)](
        operands.rows(drows if on_input else dy),
        operands.rows(x) if on_input else None,
        None if partial is None else operands.rows(partial),
        None if bias is None else operands.vectors(bias),
        operands.rows(ids),
        operands.rows(dweights),
        *(ids.shape[1], e.experts, 0 if partial is None else partial.shape[1], e.hidden),
        BLOCK=BLOCK,
    )
    if grads is not None:
        kinds = ("sorted", "weighted" if on_input else "tokens")
        for matrices, biases, dup in zip(grads.up, grads.up_bias or (None,) * len(dups), dups, strict=True):
            _outer(job, dup, x, weights, matrices, biases, kinds)
        _outer(job, dy, hidden, weights, grads.down, grads.down_bias, ("tokens" if on_input else "weighted", "sorted"))
    return dx, dweights


def _hidden(
    job: Job,
    dy: Tensor,
    weights: Tensor | None,
    experts: Experts,
    saved: Sequence[Tensor],
    hidden: Tensor,
    dups: Sequence[Tensor],
) -> Tensor | None:
    """Writes ``hidden`` and ``dups``; what each block of columns adds to the gradients of the weights."""
    e = job.spec.expert
    config = replace(job.down, columns=min(NARROW, job.down.columns))
    found, written = (launch.gate_and_up(held, experts, e.gated) for held in (saved, dups))
    partial = None
    if weights is not None:
        columns = triton.cdiv(e.intermediate, config.columns)
        partial = hidden.new_empty((len(hidden), columns), dtype=torch.float32)
    job.start(
        hidden_kernel,
        config,
        e.intermediate,
        e.hidden,
        operands.rows(dy),
        None if weights is None else operands.rows(weights),
        operands.rows(found[0]),
        operands.rows(found[1]),
        operands.rows(hidden),
        operands.rows(written[0]),
        operands.rows(written[1]),
        None if partial is None else operands.rows(partial),
        operands.matrices(experts.down),  # type: ignore[arg-type]
        *job.params,
        ACT=e.act,
        GATED=e.gated,
    )
    return partial


def _rows(job: Job, dups: Sequence[Tensor], experts: Experts, drows: Tensor) -> None:
    """drows [S, H], by flat position: the up products' gradients times their matrices from the other side."""
    for i, (dup, matrices) in enumerate(zip(dups, experts.up, strict=True)):
        job.start(
            down_kernel,
            job.down,
            job.spec.expert.hidden,
            dup.shape[1],
            operands.rows(dup),
            operands.rows(drows),
            operands.matrices(_turned(matrices)),  # type: ignore[arg-type]
            None,
            ADD=i > 0,
        )


def _turned(held: Held) -> Held:
    return [t.t() for t in held] if isinstance(held, list) else held.transpose(-2, -1)


def _outer(
    job: Job,
    left: Tensor,
    right: Tensor,
    weights: Tensor,
    matrix: Held,
    bias: Vectors | None,
    kinds: tuple[str, str],
) -> None:
    """matrix [E, out, in] and bias [E, out]: sums over the rows of each expert.  What is on meta is not wanted."""
    wanted = [None if held is None or held[0].is_meta else held for held in (matrix, bias)]
    if wanted == [None, None]:
        return
    rows, columns = matrix[0].shape
    block_m, block_n, inner = SQUARE
    grid = (triton.cdiv(rows, block_m), triton.cdiv(columns, block_n) if wanted[0] is not None else 1, len(matrix))
    outer_kernel[grid](
        operands.rows(left),
        operands.rows(right),
        operands.rows(weights),
        None if wanted[0] is None else operands.matrices(wanted[0]),
        None if wanted[1] is None else operands.vectors(wanted[1]),
        *(job.routed.ends, job.routed.order, job.routed.top_k, rows, columns),
        LEFT=kinds[0],
        RIGHT=kinds[1],
        DTYPE=DTYPES[job.dtype],
        PRECISION=launch.precision(job.dtype),
        BM=block_m,
        BN=block_n,
        BK=inner,
    )
