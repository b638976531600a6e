"""What a call of the library is given: the fields of layer.h, filled from a spec and views of the weights."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_int64, c_void_p
from functools import lru_cache

import torch
from torch import Tensor

from moe_fx.binding import Experts, Matrices, Order, Quantised, Vectors, split_gate_up
from moe_fx.reasons import MoEFxRuntimeError
from moe_fx.reference.activations import ACTIVATIONS
from moe_fx.spec import ExpertSpec

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NAMES = tuple(dict.fromkeys(name for name, _ in ACTIVATIONS))  # in the order of LIST in activations.h


class CMatrices(ctypes.Structure):
    _fields_ = (("base", c_void_p), ("table", c_void_p), *((name, c_int64) for name in ("expert", "out", "in")))


class CLayer(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("tokens", "top_k", "experts", "hidden", "inter")),
        *((name, c_int64) for name in ("type", "out_type", "bias_type", "act", "gated")),
        *((name, c_double) for name in ("p0", "p1")),
        ("x", c_void_p),
        *((name, c_int64) for name in ("x_row", "each")),
        *((name, c_void_p) for name in ("ids", "weights")),
        *((name, CMatrices) for name in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")),
        ("y", c_void_p),
        ("y_row", c_int64),
        *((name, c_void_p) for name in ("rows", "inner", "kept", "kept_up")),
        *((name, c_int64) for name in ("kept_row", "kept_step", "threads")),
    )


class CGradients(ctypes.Structure):
    _fields_ = (
        ("dy", c_void_p),
        ("dy_row", c_int64),
        ("x", c_void_p),
        ("x_row", c_int64),
        *((name, c_void_p) for name in ("weights", "dweights")),
        *((name, CMatrices) for name in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")),
    )


def layer(spec: ExpertSpec, experts: Experts, y: Tensor) -> CLayer:
    """All but the tokens and the rooms; y [T, H] is written.

    MoEFxRuntimeError for matrices, or biases, of several dtypes, and for matrices whose numbers do not lie side by
    side: the library takes addresses and could not tell.
    """
    first = experts.up[0][0]
    assert isinstance(first, Tensor)
    biases = [*experts.up_bias, *([] if experts.down_bias is None else [experts.down_bias])]
    for kind, members in (("matrices", (*experts.up, experts.down)), ("biases", biases)):
        found = {one.dtype for member in members for one in _each(member)}
        if len(found) > 1 or not found <= TYPES.keys():
            raise MoEFxRuntimeError(f"kernel 'cpp' takes {kind} of one dtype, 16 or 32 bits: use another kernel")
    if any(1 not in one.stride()[-2:] for member in (*experts.up, experts.down) for one in _each(member)):
        raise MoEFxRuntimeError(
            "kernel 'cpp' reads matrices whose rows or columns lie side by side: use another kernel"
        )
    p0, p1 = (*spec.act_params, 0.0, 0.0)[:2]
    return CLayer(
        experts=spec.experts,
        hidden=spec.hidden,
        inter=spec.intermediate,
        type=TYPES[first.dtype],
        out_type=TYPES[y.dtype],
        bias_type=TYPES[biases[0][0].dtype if biases else first.dtype],
        act=NAMES.index(spec.act),
        gated=spec.gated,
        p0=p0,
        p1=p1,
        y=y.data_ptr(),
        y_row=y.stride(0) * y.element_size(),
        **_members(experts, spec),
    )


def gradients(spec: ExpertSpec, grads: Experts | None) -> CGradients:
    """Where the gradients of the matrices and biases go; what is on meta, or all of None, is not wanted."""
    return CGradients() if grads is None else CGradients(**_members(grads, spec))


def keep(call: CLayer, kept: Sequence[Tensor], order: Order, spec: ExpertSpec) -> None:
    """kept: none, or results of the up products, [T k, out] for each member of ``Experts.up``, rows by expert."""
    if not kept:
        return
    gate, up = kept[0], kept[-1]
    if len(kept) == 1 and spec.gated:
        gate, up = split_gate_up(kept[0], order)
    call.kept, call.kept_up = gate.data_ptr(), up.data_ptr()
    call.kept_row, call.kept_step = (gate.stride(i) * gate.element_size() for i in (0, 1))


def rows_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [n, m] in that dtype, numbers of a row side by side; itself where it is so already."""
    x = x.to(dtype)
    return x if x.stride(1) == 1 else x.contiguous()


def _members(experts: Experts, spec: ExpertSpec) -> dict[str, CMatrices]:
    gate, up = gate_and_up(experts.up, experts.order, spec)
    gate_bias, up_bias = gate_and_up(experts.up_bias, experts.order, spec) if experts.up_bias else (NONE, NONE)
    down_bias = NONE if experts.down_bias is None else held(experts.down_bias)
    return {
        "gate": gate, "up": up, "down": held(experts.down),
        "gate_bias": gate_bias, "up_bias": up_bias, "down_bias": down_bias,
    }  # fmt: skip


NONE = CMatrices()


def gate_and_up(
    members: tuple[Matrices, ...] | tuple[Vectors, ...], order: Order, spec: ExpertSpec
) -> tuple[CMatrices, CMatrices]:
    """Where gate and up lie, of matrices or of biases: two members, or one with both in ``order``."""
    if len(members) == 2:
        return held(members[0]), held(members[1])
    if not spec.gated:
        return held(members[0]), NONE
    if order == "interleaved":
        return held(members[0], 0, 2), held(members[0], 1, 2)
    halves = held(members[0]), held(members[0], spec.intermediate)
    return halves if order == "gate_up" else halves[::-1]


def held(found: Matrices | Vectors, first: int = 0, step: int = 1) -> CMatrices:
    """Matrices [E, out, in] or vectors [E, out], of which every ``step``-th row from ``first`` on counts."""
    assert not isinstance(found, Quantised)  # its capability lists no codes
    one = found[0]
    if one.is_meta:
        return NONE
    size, out = one.element_size(), one.stride(0) * one.element_size()
    strides = step * out, one.stride(-1) * size
    if isinstance(found, Tensor):
        return CMatrices(found.data_ptr() + first * out, None, found.stride(0) * size, *strides)
    table = _table(tuple(t.data_ptr() for t in found), first * out)
    return CMatrices(None, table.data_ptr(), 0, *strides)


def _each(found: Matrices | Vectors) -> list[Tensor]:
    """Every tensor that holds some of them."""
    assert not isinstance(found, Quantised)
    return [found] if isinstance(found, Tensor) else found


@lru_cache(maxsize=4096)
def _table(addresses: tuple[int, ...], offset: int) -> Tensor:
    """int64 [E]: the same for the same addresses, whatever lies there."""
    return torch.tensor(addresses, dtype=torch.int64) + offset
