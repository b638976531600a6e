"""The experts of a spec, expert by expert: forward and backward.

Sizes: x [T, H], ids [T, k] integer, weights [T, k]; the matrices of ``Experts`` as [out, in].  Any floating dtype: in
float64 this is the yardstick, in the model's dtype it keeps the rounding points of the usual eager loop.

Quantised operands: a matrix is what its codes stand for, in the dtype of the product.  The input of a product, in that
dtype, becomes what ``round_to`` makes of it.  Dynamic scales that reach over rows (a group of -1 rows, a global scale
that is not given) are one for all experts: of the up product from x (times the weights, where they are on the input)
with all its tokens, of the down product from the rows of all experts.  Backward, rounding counts as the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from moe_fx.binding import Experts, Matrices, Quantised, join_gate_up, split_gate_up
from moe_fx.quant import QuantKey
from moe_fx.reference.activations import activation
from moe_fx.reference.quantise import matrix, round_to, scales_of
from moe_fx.spec import ExpertSpec, MoESpec


def dtype_of(name: str, default: torch.dtype) -> torch.dtype:
    """ "" → default, else the torch dtype of that name."""
    return getattr(torch, name) if name else default


def compute_dtype(experts: Experts, spec: ExpertSpec, default: torch.dtype | None = None) -> torch.dtype:
    """dtype of the products: as the spec says, else that of the weights.

    Codes have none: it is ``default`` then, that of x.  ValueError without one.
    """
    first = experts.up[0][0]
    if isinstance(first, Tensor):
        return dtype_of(spec.compute_dtype, first.dtype)
    if not spec.compute_dtype and default is None:
        raise ValueError("quantised weights have no dtype to compute in: give that of x")
    return dtype_of(spec.compute_dtype, default or torch.float32)


@dataclass(frozen=True, slots=True)
class Rounding:
    """What the input of one product becomes; without a key it stays."""

    key: QuantKey | None = None
    scale: Tensor | None = None
    global_scale: Tensor | None = None

    def __call__(self, rows: Tensor, e: int) -> Tensor:
        """rows [n, in] of expert ``e``, in their dtype."""
        if self.key is None:
            return rows
        return round_to(rows, self.key, _of(self.scale, e), _of(self.global_scale, e))

    @property
    def by_expert(self) -> bool:
        """Experts have different scales."""
        return any(s is not None and s.dim() == 1 and s.numel() > 1 for s in (self.scale, self.global_scale))

    def over(self, rows: Callable[[], Tensor]) -> Rounding:
        """With the scales that are one for all experts; rows: the inputs of the product, of all experts."""
        key = self.key
        if key is None:
            return self
        shared = key.group.row == -1 and not key.static and self.scale is None
        if not shared and (not key.global_scale or self.global_scale is not None):
            return self
        found = scales_of(rows(), key, self.global_scale)
        return Rounding(key, found.scale if shared else self.scale, found.global_scale)


def rounding_of(operand: Literal["a1", "a2"], experts: Experts, spec: MoESpec) -> Rounding:
    """The rounding of the input of one product, with the scales that are given."""
    given = experts.scales
    scale, whole = (given.a1, given.a1_global) if operand == "a1" else (given.a2, given.a2_global)
    return Rounding(spec.quant.key(operand), scale, whole)


def _of(scale: Tensor | None, e: int) -> Tensor | None:
    """The given scale of expert ``e``."""
    return scale[e] if scale is not None and scale.dim() == 1 and scale.numel() > 1 else scale


@dataclass(frozen=True, slots=True)
class _Block:
    """One call: dtype of the products, a1 and a2 the rounding of their inputs."""

    experts: Experts
    spec: ExpertSpec
    dtype: torch.dtype
    a1: Rounding = Rounding()
    a2: Rounding = Rounding()


@dataclass(slots=True)
class _Trace:
    """What one expert computed for its rows: kept for the backward.  x and hidden as the products got them."""

    x: Tensor
    gate: Tensor
    up: Tensor | None
    hidden: Tensor
    out: Tensor
    normed: Tensor


def experts_forward(x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, spec: MoESpec) -> Tensor:
    """y [T, H]: the formula at the top of spec.py, in ``combine.out_dtype`` (default x.dtype).

    ValueError where ``spec.quant`` asks for a static scale that ``experts.scales`` does not give.
    """
    combine = spec.combine
    block = _block(x, ids, weights, experts, spec)
    y = torch.zeros(x.shape, dtype=dtype_of(combine.accumulate, x.dtype), device=x.device)
    for e, token, slot, rows in _routed(x, ids, weights, spec):
        out = _expert(rows, block, e).normed
        w = weights[token, slot, None]
        y.index_add_(0, token, (out if combine.weight_on == "input" else out * w).to(y.dtype))
    return y.to(dtype_of(combine.out_dtype, x.dtype))


def experts_backward(
    dy: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    experts: Experts,
    spec: MoESpec,
    grads: Experts,
) -> tuple[Tensor, Tensor]:
    """dy [T, H] → (dx [T, H], dweights [T, k]); weight gradients are written into ``grads``, which starts as zeros and
    views the model's storage exactly as ``experts`` does.  Activations are recomputed.  Codes have no gradient: a
    ``Quantised`` member of ``grads`` is left alone."""
    on_input = spec.combine.weight_on == "input"
    block = _block(x, ids, weights, experts, spec)
    dx, dweights = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (x, weights))
    for e, token, slot, rows in _routed(x, ids, weights, spec):
        w = weights[token, slot, None]
        trace = _expert(rows, block, e)
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


def _routed(x: Tensor, ids: Tensor, weights: Tensor, spec: MoESpec) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Each expert that has rows: (expert, their tokens [n], their slots [n], their inputs [n, H])."""
    for e in range(spec.expert.experts):
        token, slot = torch.where(ids == e)
        if token.numel() == 0:
            continue
        yield e, token, slot, x[token] * weights[token, slot, None] if spec.combine.weight_on == "input" else x[token]


def _block(x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, spec: MoESpec) -> _Block:
    block = _Block(experts, spec.expert, compute_dtype(experts, spec.expert, x.dtype))
    if not (spec.quant.a1 or spec.quant.a2):
        return block

    def inputs() -> Tensor:
        on_input = spec.combine.weight_on == "input"
        return ((x[:, None] * weights[..., None]).flatten(0, 1) if on_input else x).to(block.dtype)

    def hidden() -> Tensor:
        found = [_up(rows, block, e)[3] for e, _, _, rows in _routed(x, ids, weights, spec)]
        return torch.cat([x.new_empty((0, spec.expert.intermediate), dtype=block.dtype), *found])

    block = replace(block, a1=rounding_of("a1", experts, spec).over(inputs))
    return replace(block, a2=rounding_of("a2", experts, spec).over(hidden))


def _up(rows: Tensor, block: _Block, e: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """rows [n, H] of expert ``e`` → (the input of the product, gate, up, hidden [n, I])."""
    experts, spec, compute = block.experts, block.spec, block.dtype
    rows = block.a1(rows.to(compute), e)
    up = [rows @ matrix(m, e, compute).t() for m in experts.up]
    if spec.w13_bias:
        up = [u + matrix(bias, e, compute) for u, bias in zip(up, experts.up_bias, strict=True)]
    gate, second = _gate_and_up(up, experts, spec)
    act = activation(spec.act, spec.gated)
    inner = dtype_of(spec.act_dtype, compute)
    hidden = act.forward(gate.to(inner), None if second is None else second.to(inner), *spec.act_params).to(compute)
    return rows, gate, second, hidden


def _expert(rows: Tensor, block: _Block, e: int) -> _Trace:
    """rows [n, H] through expert ``e``."""
    experts, spec, compute = block.experts, block.spec, block.dtype
    rows, gate, second, hidden = _up(rows, block, e)
    hidden = block.a2(hidden, e)
    out = hidden @ matrix(experts.down, e, compute).t()
    if spec.w2_bias:
        assert experts.down_bias is not None
        out = out + matrix(experts.down_bias, e, compute)
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
    _write(grads.down, e, dout.t() @ trace.hidden)
    if grads.down_bias is not None:
        _write(grads.down_bias, e, dout.sum(0))
    dhidden = dout @ matrix(experts.down, e, compute)
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
        _write(dmatrix, e, d.t() @ trace.x)
    for dbias, d in zip(grads.up_bias, dups, strict=False):
        _write(dbias, e, d.sum(0))
    drows = dups[0] @ matrix(experts.up[0], e, compute)
    return drows if len(dups) == 1 else drows + dups[1] @ matrix(experts.up[1], e, compute)


def _write(target: Matrices, e: int, gradient: Tensor) -> None:
    """Of the matrix or bias of expert ``e``; codes have none."""
    if not isinstance(target, Quantised):
        target[e].copy_(gradient)
