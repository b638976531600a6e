"""The experts of a spec, expert by expert: forward and backward.

Sizes: x [T, H], ids [T, k] integer, weights [T, k]; the matrices of ``Experts`` as [out, in].  Any floating dtype: in
float64 this is the yardstick, in the model's dtype it keeps the rounding points of the usual eager loop.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_fx.binding import Experts, join_gate_up, split_gate_up
from moe_fx.reference.activations import activation
from moe_fx.spec import ExpertSpec, MoESpec


def dtype_of(name: str, default: torch.dtype) -> torch.dtype:
    """ "" → default, else the torch dtype of that name."""
    return getattr(torch, name) if name else default


def compute_dtype(experts: Experts, spec: ExpertSpec) -> torch.dtype:
    """dtype of the products: as the spec says, else that of the weights."""
    return dtype_of(spec.compute_dtype, experts.up[0][0].dtype)


@dataclass(slots=True)
class _Trace:
    """What one expert computed for its rows: kept for the backward."""

    x: Tensor
    gate: Tensor
    up: Tensor | None
    hidden: Tensor
    out: Tensor
    normed: Tensor


def experts_forward(x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, spec: MoESpec) -> Tensor:
    """y [T, H]: the formula at the top of spec.py, in ``combine.out_dtype`` (default x.dtype)."""
    combine = spec.combine
    y = torch.zeros(x.shape, dtype=dtype_of(combine.accumulate, x.dtype), device=x.device)
    for e in range(spec.expert.experts):
        token, slot = torch.where(ids == e)
        if token.numel() == 0:
            continue
        w = weights[token, slot, None]
        rows = x[token] * w if combine.weight_on == "input" else x[token]
        out = _expert(rows, experts, e, spec.expert).normed
        y.index_add_(0, token, (out if combine.weight_on == "input" else out * w).to(y.dtype))
    return y.to(dtype_of(combine.out_dtype, x.dtype))


def experts_backward(
    dy: Tensor, x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, spec: MoESpec, grads: Experts
) -> tuple[Tensor, Tensor]:
    """dy [T, H] → (dx [T, H], dweights [T, k]); weight gradients are written into ``grads``, which starts as zeros and
    views the model's storage exactly as ``experts`` does.  Activations are recomputed."""
    on_input = spec.combine.weight_on == "input"
    dx, dweights = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (x, weights))
    for e in range(spec.expert.experts):
        token, slot = torch.where(ids == e)
        if token.numel() == 0:
            continue
        w = weights[token, slot, None]
        trace = _expert(x[token] * w if on_input else x[token], experts, e, spec.expert)
        dout = dy[token].to(torch.promote_types(dy.dtype, w.dtype))
        if not on_input:
            dweights[token, slot] = (dout * trace.normed).sum(-1).to(dweights.dtype)
            dout = dout * w
        drows = _expert_backward(dout.to(trace.normed.dtype), trace, experts, e, spec.expert, grads)
        if on_input:
            dweights[token, slot] = (drows * x[token]).sum(-1).to(dweights.dtype)
            drows = drows * w
        dx.index_add_(0, token, drows.to(dx.dtype))
    return dx, dweights


def _expert(rows: Tensor, experts: Experts, e: int, spec: ExpertSpec) -> _Trace:
    """rows [n, H] through expert ``e``."""
    compute = compute_dtype(experts, spec)
    rows = rows.to(compute)
    up = [rows @ matrix[e].to(compute).t() for matrix in experts.up]
    if spec.w13_bias:
        up = [u + bias[e].to(compute) for u, bias in zip(up, experts.up_bias, strict=True)]
    gate, second = _gate_and_up(up, experts, spec)
    act = activation(spec.act, spec.gated)
    inner = dtype_of(spec.act_dtype, compute)
    hidden = act.forward(gate.to(inner), None if second is None else second.to(inner), *spec.act_params).to(compute)
    out = hidden @ experts.down[e].to(compute).t()
    if spec.w2_bias:
        assert experts.down_bias is not None
        out = out + experts.down_bias[e].to(compute)
    return _Trace(rows, gate, second, hidden, out, normalise(out, experts.norm, spec))


def _gate_and_up(up: list[Tensor], experts: Experts, spec: ExpertSpec) -> tuple[Tensor, Tensor | None]:
    if not spec.gated:
        return up[0], None
    return (up[0], up[1]) if len(up) == 2 else split_gate_up(up[0], experts.order)


def normalise(out: Tensor, weight: Tensor | None, spec: ExpertSpec) -> Tensor:
    """An expert's outputs [n, H] through ``spec.norm`` with its weight [H]: in float32 or wider, result as ``out``."""
    if not spec.norm:
        return out
    assert weight is not None
    wide = out.to(torch.promote_types(out.dtype, torch.float32))
    g = weight.to(wide.dtype)
    if spec.norm == "rms_input_scaled":
        wide = (wide * (1 + g)).to(out.dtype).to(wide.dtype)
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + spec.norm_eps)
    scale = {"rms": g, "rms_plus_one": 1 + g, "rms_input_scaled": None}[spec.norm]
    return (unit if scale is None else unit * scale).to(out.dtype)


def norm_backward(dout: Tensor, out: Tensor, weight: Tensor, spec: ExpertSpec) -> tuple[Tensor, Tensor]:
    """(gradient of ``normalise``'s input, gradient of its weight [H])."""
    wide = out.to(torch.promote_types(out.dtype, torch.float32))
    d, g = dout.to(wide.dtype), weight.to(wide.dtype)
    inner = wide * (1 + g) if spec.norm == "rms_input_scaled" else wide
    r = torch.rsqrt(inner.square().mean(-1, keepdim=True) + spec.norm_eps)
    unit = inner * r
    dunit = d if spec.norm == "rms_input_scaled" else d * (g if spec.norm == "rms" else 1 + g)
    dinner = r * (dunit - unit * (dunit * unit).mean(-1, keepdim=True))
    if spec.norm == "rms_input_scaled":
        return (dinner * (1 + g)).to(out.dtype), (dinner * wide).sum(0)
    return dinner.to(out.dtype), (d * unit).sum(0)


def _expert_backward(dout: Tensor, trace: _Trace, experts: Experts, e: int, spec: ExpertSpec, grads: Experts) -> Tensor:
    """Writes the weight gradients of expert ``e`` and returns the gradient of its rows."""
    if spec.norm:
        assert experts.norm is not None
        assert grads.norm is not None
        dout, dnorm = norm_backward(dout, trace.out, experts.norm, spec)
        grads.norm += dnorm.to(grads.norm.dtype)
    compute = trace.x.dtype
    grads.down[e].copy_(dout.t() @ trace.hidden)
    if grads.down_bias is not None:
        grads.down_bias[e].copy_(dout.sum(0))
    dhidden = dout @ experts.down[e].to(compute)
    inner = dtype_of(spec.act_dtype, compute)
    up = None if trace.up is None else trace.up.to(inner)
    act = activation(spec.act, spec.gated)
    dgate, dup = act.backward(dhidden.to(inner), trace.gate.to(inner), up, *spec.act_params)
    if dup is None:
        dups = [dgate]
    else:
        dups = [dgate, dup] if len(experts.up) == 2 else [join_gate_up(dgate, dup, experts.order)]
    dups = [d.to(compute) for d in dups]
    for dmatrix, d in zip(grads.up, dups, strict=True):
        dmatrix[e].copy_(d.t() @ trace.x)
    for dbias, d in zip(grads.up_bias, dups, strict=False):
        dbias[e].copy_(d.sum(0))
    drows = dups[0] @ experts.up[0][e].to(compute)
    return drows if len(dups) == 1 else drows + dups[1] @ experts.up[1][e].to(compute)
