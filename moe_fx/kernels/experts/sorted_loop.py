"""One pair of GEMMs per active expert over rows sorted by expert: any dtype, any storage, any spec.

x, ids → rows by expert → chunks of experts: up products, activation, down products → y.
Sorting costs one host synchronisation; there is no mask of T * E.  Weights are read in place.
"""

from __future__ import annotations

from torch import Tensor

from moe_fx.binding import Experts
from moe_fx.kernels.experts.reference import ALL, EFFICIENCY
from moe_fx.kernels.experts.rows import (
    CHUNK,
    activate,
    down_products,
    empty_result,
    finish,
    gather_rows,
    inside,
    sort_rows,
    up_products,
)
from moe_fx.kernels.registry import Cost, experts_kernel, touched
from moe_fx.reference.experts import compute_dtype, normalise
from moe_fx.spec import MoESpec


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
        up = up_products(inputs, experts, chunk, None if keep is None else [k[first:last] for k in keep])
        result = down_products(activate(up, experts, spec.expert), experts, chunk, out[first:last])
        if spec.expert.norm:
            result.copy_(normalise(result, experts.norm, spec.expert))
    if rows.used < ids.numel():
        out[rows.used :].zero_()
        weights = weights.masked_fill(~inside(ids, spec.expert.experts), 0)
    return finish(out, rows, weights, spec, x.dtype)
