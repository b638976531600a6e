"""Activations between the two projections, each with its derivative written out (ops run below autograd).

``forward(gate, up, *params) -> h``; ``up`` is None for an ungated expert.
``backward(dh, gate, up, *params) -> (dgate, dup | None)``.  All tensors share one shape and dtype.
A new activation is one ``@activation`` class; tests compare its backward with autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Forward = Callable[..., Tensor]
Backward = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, slots=True)
class Activation:
    """A registered activation.

    gated: takes an up projection.  params: names of its parameters.  usual: values that ops take without being told.
    bends: ops whose derivative at a bend away from 0 this one has; others that give the same values may have another.
    """

    name: str
    gated: bool
    params: tuple[str, ...]
    forward: Forward
    backward: Backward
    usual: tuple[float, ...] = ()
    bends: tuple[str, ...] = ()


ACTIVATIONS: dict[tuple[str, bool], Activation] = {}


def activation(name: str, gated: bool) -> Activation:
    """The registered activation; KeyError lists the known ones."""
    found = ACTIVATIONS.get((name, gated))
    if found is None:
        known = ", ".join(sorted(n for n, g in ACTIVATIONS if g == gated))
        raise KeyError(f"no {'gated' if gated else 'ungated'} activation {name!r}; known: {known}")
    return found


def _register(
    name: str,
    gated: bool,
    params: tuple[str, ...],
    forward: Forward,
    backward: Backward,
    usual: tuple[float, ...] = (),
    bends: tuple[str, ...] = (),
) -> None:
    if (name, gated) in ACTIVATIONS:
        raise ValueError(f"activation {name!r} (gated={gated}) is registered twice")
    ACTIVATIONS[name, gated] = Activation(name, gated, params, forward, backward, usual, bends)


# --- act(gate) * up, and act(a) alone: one pointwise function and its derivative serve both


def _pointwise(name: str, f: Forward, df: Forward, bends: tuple[str, ...] = (), **params: float | None) -> None:
    """params: name → usual value, None without one."""
    known = tuple(params), tuple(p for p in params.values() if p is not None)
    _register(
        name,
        True,
        known[0],
        lambda gate, up, *p: f(gate, *p) * up,
        lambda dh, gate, up, *p: (dh * up * df(gate, *p), dh * f(gate, *p)),
        known[1],
        bends,
    )
    _register(
        name, False, known[0], lambda a, _, *p: f(a, *p), lambda dh, a, _, *p: (dh * df(a, *p), None), known[1], bends
    )


def _dsilu(a: Tensor) -> Tensor:
    s = torch.sigmoid(a)
    return s * (1 + a * (1 - s))


def _dgelu(a: Tensor) -> Tensor:
    cdf = 0.5 * (1 + torch.erf(a * math.sqrt(0.5)))
    return cdf + a * torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)


def _dgelu_tanh(a: Tensor) -> Tensor:
    c = math.sqrt(2 / math.pi)
    t = torch.tanh(c * (a + 0.044715 * a**3))
    return 0.5 * (1 + t) + 0.5 * a * (1 - t * t) * c * (1 + 3 * 0.044715 * a * a)


def _dsigmoid(a: Tensor) -> Tensor:
    s = torch.sigmoid(a)
    return s * (1 - s)


def _swish(a: Tensor, beta: float = 1.702) -> Tensor:
    return a * torch.sigmoid(beta * a)


def _dswish(a: Tensor, beta: float = 1.702) -> Tensor:
    s = torch.sigmoid(beta * a)
    return s * (1 + beta * a * (1 - s))


def _dsoftplus(a: Tensor, beta: float) -> Tensor:
    return torch.where(a * beta > 20, 1.0, torch.sigmoid(a * beta)).to(a.dtype)  # 20: where torch turns linear


def _dselu(a: Tensor) -> Tensor:
    scale, alpha = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717
    return scale * torch.where(a > 0, 1.0, alpha * a.exp()).to(a.dtype)


def _dhardswish(a: Tensor) -> Tensor:
    return torch.where(a < 3, torch.where(a > -3, a / 3 + 0.5, 0.0), 1.0).to(a.dtype)


_SIXTH = float(torch.tensor(1 / 6))  # in float32, as torch's derivative of hardsigmoid has it in every dtype


def _between(a: Tensor, low: float, high: float) -> Tensor:
    """Derivative of hardtanh as torch defines it: 1 on the open interval."""
    return ((a > low) & (a < high)).to(a.dtype)


_pointwise("silu", F.silu, _dsilu)
_pointwise("gelu", F.gelu, _dgelu)
_pointwise("gelu_tanh", lambda a: F.gelu(a, approximate="tanh"), _dgelu_tanh)
_pointwise("quick_gelu", _swish, _dswish)
_pointwise("relu", F.relu, lambda a: (a > 0).to(a.dtype))
_pointwise("relu2", lambda a: F.relu(a).square(), lambda a: 2 * F.relu(a))
_pointwise("sigmoid", torch.sigmoid, _dsigmoid)
_pointwise("tanh", torch.tanh, lambda a: 1 - torch.tanh(a).square())
_pointwise("identity", lambda a: a, torch.ones_like)
_pointwise("leaky_relu", F.leaky_relu, lambda a, slope: torch.ones_like(a).where(a > 0, slope), slope=0.01)
_pointwise("elu", F.elu, lambda a, alpha: torch.where(a > 0, 1.0, alpha * a.exp()).to(a.dtype), alpha=1.0)
_pointwise("selu", F.selu, _dselu)
_pointwise("softplus", F.softplus, _dsoftplus, beta=1.0)
_pointwise("softsign", F.softsign, lambda a: (1 + a.abs()).square().reciprocal())
_pointwise("swish", _swish, _dswish, beta=None)
_pointwise("relu6", F.relu6, lambda a: _between(a, 0.0, 6.0), ("relu6", "hardtanh"))
_pointwise("hardswish", F.hardswish, _dhardswish, ("hardswish",))
_pointwise("hardsigmoid", F.hardsigmoid, lambda a: _between(a, -3.0, 3.0) * _SIXTH, ("hardsigmoid",))
_pointwise("mish", F.mish, lambda a: _dmish(a))


def _dmish(a: Tensor) -> Tensor:
    t = torch.tanh(F.softplus(a))
    return t + a * (1 - t * t) * torch.sigmoid(a)


# --- silu(min(gate, limit)) * clamp(up, -limit, limit): DeepSeek-V4, GLM-5, Hunyuan-V4


_CLAMPS = ("clamp", "clamp_", "clip", "clip_", "clamp_min", "clamp_max")


def _inside(a: Tensor, low: float, high: float) -> Tensor:
    """Derivative of clamp as torch defines it: 1 on the closed interval."""
    return ((a >= low) & (a <= high)).to(a.dtype)


def _swiglu_clamp(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def _swiglu_clamp_backward(dh: Tensor, gate: Tensor, up: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    g, u = gate.clamp(max=limit), up.clamp(-limit, limit)
    dgate = dh * u * _dsilu(g) * _inside(gate, -math.inf, limit)
    return dgate, dh * F.silu(g) * _inside(up, -limit, limit)


_register("swiglu_clamp", True, ("limit",), _swiglu_clamp, _swiglu_clamp_backward, bends=_CLAMPS)


# --- min(silu(gate), limit) * clamp(up, -limit, limit): Step-3.7 clamps after the activation


def _swiglu_step(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    return F.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)


def _swiglu_step_backward(dh: Tensor, gate: Tensor, up: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    s = F.silu(gate)
    dgate = dh * up.clamp(-limit, limit) * _inside(s, -math.inf, limit) * _dsilu(gate)
    return dgate, dh * s.clamp(max=limit) * _inside(up, -limit, limit)


_register("swiglu_step", True, ("limit",), _swiglu_step, _swiglu_step_backward, bends=_CLAMPS)


# --- g * sigmoid(alpha * g) * (u + 1), g = min(gate, limit), u = clamp(up, -limit, limit): gpt-oss, MiniMax-M3


def _swiglu_oai(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    g, u = gate.clamp(max=limit), up.clamp(-limit, limit)
    return g * torch.sigmoid(alpha * g) * (u + 1)


def _swiglu_oai_backward(dh: Tensor, gate: Tensor, up: Tensor, alpha: float, limit: float) -> tuple[Tensor, Tensor]:
    g, u = gate.clamp(max=limit), up.clamp(-limit, limit)
    s = torch.sigmoid(alpha * g)
    dgate = dh * (u + 1) * s * (1 + alpha * g * (1 - s)) * _inside(gate, -math.inf, limit)
    return dgate, dh * g * s * _inside(up, -limit, limit)


_register("swiglu_oai", True, ("alpha", "limit"), _swiglu_oai, _swiglu_oai_backward, bends=_CLAMPS)


# --- softcap(gate) * sigmoid(gate) * softcap(up), softcap_c(a) = c * tanh(a / c): Inkling-2


def _swiglu_softcap(gate: Tensor, up: Tensor, gate_cap: float, up_cap: float) -> Tensor:
    return gate_cap * torch.tanh(gate / gate_cap) * torch.sigmoid(gate) * (up_cap * torch.tanh(up / up_cap))


def _swiglu_softcap_backward(
    dh: Tensor, gate: Tensor, up: Tensor, gate_cap: float, up_cap: float
) -> tuple[Tensor, Tensor]:
    tg, tu, s = torch.tanh(gate / gate_cap), torch.tanh(up / up_cap), torch.sigmoid(gate)
    dgate = dh * (up_cap * tu) * ((1 - tg * tg) * s + gate_cap * tg * s * (1 - s))
    return dgate, dh * gate_cap * tg * s * (1 - tu * tu)


_register("swiglu_softcap", True, ("gate_cap", "up_cap"), _swiglu_softcap, _swiglu_softcap_backward)
