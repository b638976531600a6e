"""One pair of GEMMs per active expert over rows sorted by expert: any dtype, any storage, any spec.

x, ids → rows by expert → chunks of experts: up products, activation, down products → y.
Sorting costs one host synchronisation; there is no mask of T * E.  Weights are read in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fx.binding import Experts, Matrices
from moe_fx.kernels.experts.reference import ALL, EFFICIENCY
from moe_fx.kernels.experts.rows import (
    Segment,
    activate,
    empty_result,
    finish,
    gather_rows,
    inside,
    sort_rows,
)
from moe_fx.kernels.registry import Cost, experts_kernel, touched
from moe_fx.reference.experts import compute_dtype, normalise
from moe_fx.spec import MoESpec

CHUNK = 256  # rows that share one activation call: few calls at small T, inside the L2 cache at large T


@experts_kernel(
    "sorted_loop",
    capability=ALL,
    cost=Cost("active", lambda E, T, k: 18 + 4 * touched(E, T, k), EFFICIENCY),
    rank=20,
)
def sorted_loop(
    x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, spec: MoESpec, keep: list[Tensor] | None = None
) -> Tensor:
    """x [T, H], ids [T, k], weights [T, k] → y [T, H]; the up products go to ``keep``.  Runs below autograd."""
    rows = sort_rows(ids, spec.expert.experts)
    dtype = compute_dtype(experts, spec.expert)
    if keep is not None:
        keep += [x.new_empty((ids.numel(), matrices[0].shape[0]), dtype=dtype) for matrices in experts.up]
    if not rows.used:
        return empty_result(x, spec)
    out = x.new_empty((ids.numel(), x.shape[1]), dtype=dtype)
    for chunk in rows.chunks(CHUNK):
        first, last = chunk[0][1], chunk[-1][2]
        inputs = gather_rows(x, weights, rows.order[first:last], spec, dtype)
        kept = [None] * len(experts.up) if keep is None else [k[first:last] for k in keep]
        up = [_products(inputs, *pair, chunk) for pair in zip(experts.up, kept, strict=True)]
        for result, biases in zip(up, experts.up_bias, strict=False):
            _add_biases(result, biases, chunk)
        hidden = activate(up, experts, spec.expert)
        result = _products(hidden, experts.down, out[first:last], chunk)
        if experts.down_bias is not None:
            _add_biases(result, experts.down_bias, chunk)
        if spec.expert.norm:
            result.copy_(normalise(result, experts.norm, spec.expert))
    if rows.used < ids.numel():
        out[rows.used :].zero_()
        weights = weights.masked_fill(~inside(ids, spec.expert.experts), 0)
    return finish(out, rows, weights, spec, x.dtype)


def _products(inputs: Tensor, matrices: Matrices, out: Tensor | None, chunk: list[Segment]) -> Tensor:
    """inputs [n, in] of the chunk's rows times each row's own matrix → [n, out], in the dtype of inputs."""
    if out is None:
        out = inputs.new_empty((inputs.shape[0], matrices[0].shape[0]))
    sizes = [stop - start for _, start, stop in chunk]
    if isinstance(matrices, Tensor):
        whole = matrices.transpose(1, 2)
        chosen = [whole.select(0, expert) for expert, _, _ in chunk]
    else:
        chosen = [matrices[expert].t() for expert, _, _ in chunk]
    cast = chosen[0].dtype != inputs.dtype
    for rows, matrix, result in zip(inputs.split(sizes), chosen, out.split(sizes), strict=True):
        torch.mm(rows, matrix.to(inputs.dtype) if cast else matrix, out=result)
    return out


def _add_biases(rows: Tensor, biases: Matrices, chunk: list[Segment]) -> None:
    sizes = [stop - start for _, start, stop in chunk]
    for (expert, _, _), part in zip(chunk, rows.split(sizes), strict=True):
        part.add_(biases[expert].to(rows.dtype))
