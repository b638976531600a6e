"""The backward that all PyTorch experts kernels share: active experts only, from saved up products or new ones.

Formulas of ``moe_fx.reference.experts_backward``.  With the routing weight on the output and no norm, dweights is taken
between the projections: <dy, W2 h + b2> = <W2' dy, h> + <dy, b2>, which saves the down product of the recomputation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moe_fx.binding import Experts, join_gate_up
from moe_fx.kernels.capability import RowSchemes
from moe_fx.kernels.experts.rows import (
    CHUNK,
    Segment,
    SortedRows,
    activate,
    combine,
    down_products,
    gate_and_up,
    gather_rows,
    inside,
    products,
    rounded,
    sort_rows,
    up_products,
)
from moe_fx.reference.activations import activation
from moe_fx.reference.experts import compute_dtype, norm_backward, normalise, rounding_of
from moe_fx.spec import MoESpec


def experts_backward(
    dy: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    experts: Experts,
    spec: MoESpec,
    grads: Experts | None,
    saved: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """dy [T, H] → (dx [T, H], dweights [T, k]), in the dtypes of x and weights.

    saved: what the forward kept, the up products [T * k, ·] of sorted rows; none are computed again.
    Weight gradients are written into ``grads``, viewed exactly as ``experts`` views the weights; what it holds before
    is overwritten, with zeros for experts without rows.  A member on meta, or None for all, is of frozen weights: no
    product is spent on it.
    """
    rows = sort_rows(ids, spec.expert.experts)
    if grads is not None:
        _clear(grads, set(range(spec.expert.experts)) - {expert for expert, _, _ in rows.segments})
    if not rows.used:
        dx, dweights = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (x, weights))
        return dx, dweights
    job = _Job(dy, x, weights, experts, spec, grads, rows, saved)
    for chunk in rows.chunks(CHUNK if job.by_row else rows.used):
        job.chunk(chunk)
    if rows.used < ids.numel():
        job.drows[rows.used :].zero_()
        job.dweights[rows.used :].zero_()
    places = rows.places(ids.shape[1])
    on_input = spec.combine.weight_on == "input"
    if on_input and rows.used < ids.numel():
        weights = weights.masked_fill(~inside(ids, spec.expert.experts), 0)
    dx = combine(x.new_empty(x.shape), job.drows, places, weights if on_input else None, x.dtype)
    return dx, job.dweights[places].to(weights.dtype)


class _Job:
    """One backward: the inputs, and what each expert adds (drows [S, H], dweights [S] in order of expert)."""

    def __init__(
        self,
        dy: Tensor,
        x: Tensor,
        weights: Tensor,
        experts: Experts,
        spec: MoESpec,
        grads: Experts | None,
        rows: SortedRows,
        saved: Sequence[Tensor],
    ) -> None:
        self.dy, self.x, self.weights, self.experts, self.spec, self.grads = dy, x, weights, experts, spec, grads
        self.order, self.saved = rows.order, saved
        self.dtype = compute_dtype(experts, spec.expert, x.dtype)
        size = (rows.order.numel(), x.shape[1])
        self.by_row = all((None, spec.quant.key(operand)) in RowSchemes() for operand in ("a1", "a2"))
        if not self.by_row:
            self.experts = self._shared_scales()
        self.drows = torch.empty(size, dtype=self.dtype, device=x.device)
        wide = torch.promote_types(torch.promote_types(self.dtype, weights.dtype), torch.float32)
        self.dweights = torch.empty(size[0], dtype=wide, device=x.device)

    def _shared_scales(self) -> Experts:
        """With the scales of the up product's inputs that are one for all tokens, also for those of no expert; those of
        the down product come from one chunk of all rows."""
        x = self.x
        if self.spec.combine.weight_on == "input":
            x = (x[:, None] * self.weights[..., None]).flatten(0, 1)
        found = rounding_of("a1", self.experts, self.spec).over(lambda: x.to(self.dtype))
        scales = replace(self.experts.scales, a1=found.scale, a1_global=found.global_scale)
        return replace(self.experts, scales=scales)

    def chunk(self, chunk: list[Segment]) -> None:
        """The rows of some experts: their gradients, and the gradients of those experts' weights."""
        spec, experts = self.spec.expert, self.experts
        first, last = chunk[0][1], chunk[-1][2]
        flat = self.order[first:last]
        token = flat // self.weights.shape[1]
        inputs = gather_rows(self.x, self.weights, flat, self.spec, self.dtype)
        inputs = rounded(inputs, "a1", experts, self.spec, chunk)
        up = [s[first:last] for s in self.saved] or up_products(inputs, experts, chunk)
        hidden = rounded(activate(up, experts, spec), "a2", experts, self.spec, chunk)
        d_out = self.dy.index_select(0, token)
        w = self.weights.reshape(-1).index_select(0, flat).unsqueeze(1)
        on_input = self.spec.combine.weight_on == "input"
        if on_input or spec.norm:
            if spec.norm:
                d_out = self._norm(down_products(hidden, experts, chunk), d_out, w, first, last)
            d_out = d_out.to(self.dtype)
            dhidden = products(d_out, experts.down, chunk, back=True)
        else:
            dhidden = products(d_out.to(self.dtype), experts.down, chunk, back=True)
            self._routing(d_out, dhidden, hidden, chunk)
            d_out = (d_out * w).to(self.dtype)
            dhidden = (dhidden * w).to(self.dtype)
        dups = self._activation(up, dhidden)
        if self.grads is not None:
            for e, start, stop in chunk:
                part = slice(start - first, stop - first)
                self._write(self.grads, e, d_out[part], hidden[part], [d[part] for d in dups], inputs[part])
        drows = products(dups[0], experts.up[0], chunk, self.drows[first:last], back=True)
        if len(dups) == 2:
            drows += products(dups[1], experts.up[1], chunk, back=True)
        if on_input:
            self.dweights[first:last] = (drows.to(self.dweights.dtype) * self.x.index_select(0, token)).sum(-1)

    def _routing(self, d_out: Tensor, dhidden: Tensor, hidden: Tensor, chunk: list[Segment]) -> None:
        """dweights between the projections, before the routing weight enters."""
        wide = self.dweights.dtype
        first, last = chunk[0][1], chunk[-1][2]
        dw = (dhidden.to(wide) * hidden).sum(-1)
        if self.experts.down_bias is not None:
            for e, start, stop in chunk:
                part = slice(start - first, stop - first)
                dw[part] += (d_out[part].to(wide) * self.experts.down_bias[e].to(self.dtype)).sum(-1)
        self.dweights[first:last] = dw

    def _norm(self, out: Tensor, d_out: Tensor, w: Tensor, first: int, last: int) -> Tensor:
        """Through the routing weight (where it is on the output) and the norm: gradient of the down projection."""
        spec, experts = self.spec.expert, self.experts
        assert experts.norm is not None
        if self.spec.combine.weight_on == "output":
            normed = normalise(out, experts.norm, spec)
            self.dweights[first:last] = (d_out.to(self.dweights.dtype) * normed).sum(-1)
            d_out = d_out * w
        d_out, dnorm = norm_backward(d_out.to(self.dtype), out, experts.norm, spec)
        if self.grads is not None and self.grads.norm is not None and not self.grads.norm.is_meta:
            self.grads.norm += dnorm.to(self.grads.norm.dtype)
        return d_out

    def _activation(self, up: list[Tensor], dhidden: Tensor) -> list[Tensor]:
        """Gradients of the up products, one per member of ``experts.up``."""
        spec = self.spec.expert
        gate, second = gate_and_up(up, self.experts, spec)
        dgate, dup = activation(spec.act, spec.gated).backward(dhidden.to(gate.dtype), gate, second, *spec.act_params)
        if dup is None:
            dups = [dgate]
        else:
            dups = [dgate, dup] if len(up) == 2 else [join_gate_up(dgate, dup, self.experts.order)]
        return [d.to(self.dtype) for d in dups]

    def _write(self, grads: Experts, e: int, d_out: Tensor, hidden: Tensor, dups: list[Tensor], inputs: Tensor) -> None:
        _write_product(grads.down[e], d_out, hidden)
        for dmatrix, d in zip(grads.up, dups, strict=True):
            _write_product(dmatrix[e], d, inputs)
        biases = [*zip(grads.up_bias, dups, strict=False)]
        if grads.down_bias is not None:
            biases.append((grads.down_bias, d_out))
        for dbias, d in biases:
            if not dbias[e].is_meta:
                dbias[e].copy_(d.sum(0))


def _clear(grads: Experts, unused: set[int]) -> None:
    """Zeros for the experts that no row reached, and for the norm, to which every expert adds."""
    biases = grads.up_bias if grads.down_bias is None else (*grads.up_bias, grads.down_bias)
    for matrices in (*grads.up, grads.down, *biases):
        for e in unused:
            matrices[e].zero_()
    if grads.norm is not None:
        grads.norm.zero_()


def _write_product(target: Tensor, left: Tensor, right: Tensor) -> None:
    """target [out, in] = left' right, without a temporary where the dtypes agree."""
    if target.is_meta:
        return
    if target.dtype != left.dtype:
        target.copy_(left.t() @ right)
    elif target.stride(-1) == 1:
        torch.mm(left.t(), right, out=target)
    else:
        torch.mm(right.t(), left, out=target.t())
