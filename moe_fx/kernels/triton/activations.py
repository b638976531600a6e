"""The activations of ``moe_fx.reference.activations`` on float32 values in registers.

``forward(gate, up, p0, p1, ACT, GATED)`` and ``backward(dh, gate, up, p0, p1, ACT, GATED)``: ACT is a registered name,
p0 and p1 its parameters in the order it declares them, 0 where there are none.  ``up`` of an ungated expert is not
read.
"""

import triton
import triton.language as tl

# Names with a code path below; a test holds them against the registry.
POINTWISE = (
    "silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "sigmoid", "tanh", "identity", "leaky_relu", "elu",
    "selu", "softplus", "softsign", "swish", "relu6", "hardswish", "hardsigmoid", "mish",
)  # fmt: skip
PAIRED = ("swiglu_clamp", "swiglu_step", "swiglu_oai", "swiglu_softcap")


@triton.jit
def _tanh(a):
    """Within 2e-7 of the value, relatively: a series near 0, where 1 - exp(-2a) would lose digits."""
    small = a * a
    series = a * (1 - small * (1 / 3 - small * (2 / 15 - small * (17 / 315))))
    e = tl.exp(-2 * tl.abs(a))
    far = (1 - e) / (1 + e)
    return tl.where(tl.abs(a) < 0.1, series, tl.where(a < 0, -far, far))


@triton.jit
def _dtanh(a):
    """1 - tanh(a)^2, without the difference."""
    e = tl.exp(-2 * tl.abs(a))
    return 4 * e / ((1 + e) * (1 + e))


@triton.jit
def _log1p(a):
    """log(1 + a) for 0 <= a <= 1.  What 1 + a loses of a, log loses of its value: the quotient makes up for it."""
    u = 1 + a
    return tl.where(u == 1, a, tl.log(u) * (a / tl.where(u == 1, 1.0, u - 1)))


@triton.jit
def _softplus(a):
    return tl.maximum(a, 0) + _log1p(tl.exp(-tl.abs(a)))


@triton.jit
def _cdf(a):
    """Of the normal distribution."""
    return 0.5 * (1 + tl.erf(a * 0.7071067811865476))


@triton.jit
def pointwise(a, p0, ACT: tl.constexpr):
    """act(a)."""
    if ACT == "silu":
        return a * tl.sigmoid(a)
    elif ACT == "gelu":
        return a * _cdf(a)
    elif ACT == "gelu_tanh":
        return a * tl.sigmoid(1.5957691216057308 * (a + 0.044715 * a * a * a))  # (1 + tanh(z)) / 2 is sigmoid(2z)
    elif ACT == "quick_gelu":
        return a * tl.sigmoid(1.702 * a)
    elif ACT == "swish":
        return a * tl.sigmoid(p0 * a)
    elif ACT == "relu":
        return tl.where(a < 0, 0.0, a)  # NaN stays NaN
    elif ACT == "relu2":
        r = tl.where(a < 0, 0.0, a)
        return r * r
    elif ACT == "sigmoid":
        return tl.sigmoid(a)
    elif ACT == "tanh":
        return _tanh(a)
    elif ACT == "identity":
        return a
    elif ACT == "leaky_relu":
        return tl.where(a > 0, a, p0 * a)
    elif ACT == "elu":
        return tl.where(a > 0, a, p0 * _expm1(tl.minimum(a, 0)))
    elif ACT == "selu":
        return 1.0507009873554805 * tl.where(a > 0, a, 1.6732632423543772 * _expm1(tl.minimum(a, 0)))
    elif ACT == "softplus":
        return tl.where(a * p0 > 20, a, _softplus(a * p0) / p0)
    elif ACT == "softsign":
        return a / (1 + tl.abs(a))
    elif ACT == "relu6":
        return _clamp(a, 0.0, 6.0)
    elif ACT == "hardswish":
        return a * _clamp(a + 3, 0.0, 6.0) / 6
    elif ACT == "hardsigmoid":
        return _clamp(a + 3, 0.0, 6.0) / 6
    else:
        tl.static_assert(ACT == "mish")
        return a * _tanh(_softplus(a))


@triton.jit
def _expm1(a):
    """exp(a) - 1 for a <= 0; near 0, where the difference loses digits, a series."""
    series = a * (1 + a * (0.5 + a * (1 / 6 + a * (1 / 24 + a / 120))))
    return tl.where(a > -0.1, series, tl.exp(a) - 1)


@triton.jit
def _clamp(a, low, high):
    """NaN stays NaN, as in torch."""
    return tl.where(a < low, low, tl.where(a > high, high, a))


@triton.jit
def slope(a, p0, ACT: tl.constexpr):
    """act'(a), with torch's choice at every bend."""
    if ACT == "silu":
        s = tl.sigmoid(a)
        return s * (1 + a * (1 - s))
    elif ACT == "gelu":
        return _cdf(a) + a * tl.exp(-0.5 * a * a) * 0.3989422804014327
    elif ACT == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (a + 0.044715 * a * a * a))
        return s * (1 + a * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * a * a))
    elif ACT == "quick_gelu":
        s = tl.sigmoid(1.702 * a)
        return s * (1 + 1.702 * a * (1 - s))
    elif ACT == "swish":
        s = tl.sigmoid(p0 * a)
        return s * (1 + p0 * a * (1 - s))
    elif ACT == "relu":
        return tl.where(a > 0, 1.0, 0.0)
    elif ACT == "relu2":
        return tl.where(a > 0, 2 * a, 0.0)
    elif ACT == "sigmoid":
        s = tl.sigmoid(a)
        return s * (1 - s)
    elif ACT == "tanh":
        return _dtanh(a)
    elif ACT == "identity":
        return tl.full(a.shape, 1.0, tl.float32)
    elif ACT == "leaky_relu":
        return tl.where(a > 0, 1.0, p0)
    elif ACT == "elu":
        return tl.where(a > 0, 1.0, p0 * tl.exp(tl.minimum(a, 0)))
    elif ACT == "selu":
        return 1.0507009873554805 * tl.where(a > 0, 1.0, 1.6732632423543772 * tl.exp(tl.minimum(a, 0)))
    elif ACT == "softplus":
        return tl.where(a * p0 > 20, 1.0, tl.sigmoid(a * p0))
    elif ACT == "softsign":
        return 1 / ((1 + tl.abs(a)) * (1 + tl.abs(a)))
    elif ACT == "relu6":
        return tl.where((a > 0) & (a < 6), 1.0, 0.0)
    elif ACT == "hardswish":
        return tl.where(a < 3, tl.where(a > -3, a / 3 + 0.5, 0.0), 1.0)
    elif ACT == "hardsigmoid":
        return tl.where((a > -3) & (a < 3), 1 / 6, 0.0)
    else:
        tl.static_assert(ACT == "mish")
        s = _softplus(a)
        return _tanh(s) + a * _dtanh(s) * tl.sigmoid(a)


@triton.jit
def forward(gate, up, p0, p1, ACT: tl.constexpr, GATED: tl.constexpr):
    """hidden."""
    if ACT == "swiglu_clamp":
        g = tl.where(gate > p0, p0, gate)
        return g * tl.sigmoid(g) * _clamp(up, -p0, p0)
    elif ACT == "swiglu_step":
        s = gate * tl.sigmoid(gate)
        return tl.where(s > p0, p0, s) * _clamp(up, -p0, p0)
    elif ACT == "swiglu_oai":
        g = tl.where(gate > p1, p1, gate)
        return g * tl.sigmoid(p0 * g) * (_clamp(up, -p1, p1) + 1)
    elif ACT == "swiglu_softcap":
        return p0 * _tanh(gate / p0) * tl.sigmoid(gate) * (p1 * _tanh(up / p1))
    elif GATED:
        return pointwise(gate, p0, ACT) * up
    else:
        return pointwise(gate, p0, ACT)


@triton.jit
def backward(dh, gate, up, p0, p1, ACT: tl.constexpr, GATED: tl.constexpr):
    """(dgate, dup); dup of an ungated expert means nothing."""
    if ACT == "swiglu_clamp":
        g = tl.where(gate > p0, p0, gate)
        s = tl.sigmoid(g)
        dgate = dh * _clamp(up, -p0, p0) * tl.where(gate <= p0, s * (1 + g * (1 - s)), 0.0)
        return dgate, dh * g * s * tl.where((up >= -p0) & (up <= p0), 1.0, 0.0)
    elif ACT == "swiglu_step":
        s = tl.sigmoid(gate)
        silu = gate * s
        dgate = dh * _clamp(up, -p0, p0) * tl.where(silu <= p0, s * (1 + gate * (1 - s)), 0.0)
        return dgate, dh * tl.where(silu > p0, p0, silu) * tl.where((up >= -p0) & (up <= p0), 1.0, 0.0)
    elif ACT == "swiglu_oai":
        g = tl.where(gate > p1, p1, gate)
        s = tl.sigmoid(p0 * g)
        dgate = dh * (_clamp(up, -p1, p1) + 1) * tl.where(gate <= p1, s * (1 + p0 * g * (1 - s)), 0.0)
        return dgate, dh * g * s * tl.where((up >= -p1) & (up <= p1), 1.0, 0.0)
    elif ACT == "swiglu_softcap":
        tg = _tanh(gate / p0)
        s = tl.sigmoid(gate)
        dgate = dh * (p1 * _tanh(up / p1)) * s * (_dtanh(gate / p0) + p0 * tg * (1 - s))
        return dgate, dh * p0 * tg * s * _dtanh(up / p1)
    elif GATED:
        return dh * up * slope(gate, p0, ACT), dh * pointwise(gate, p0, ACT)
    else:
        return dh * slope(gate, p0, ACT), dh
