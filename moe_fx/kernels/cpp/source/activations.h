// The activations of moe_fx.reference.activations on vectors of float32: hidden = act(gate) * up, or act(gate) alone.
//
// ``of`` is a function of (gate, up, p0, p1), p0 and p1 its parameters in the order it declares them; ``slope`` its
// derivative, with torch's choice at every bend.  NaN stays NaN.  LIST names them in the order of NAMES in layer.py; tests
// hold the two together.
#pragma once

#include "simd.h"

namespace moe_fx {

constexpr float LOG2E = 1.44269504f, LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;

// Within 2 ulp: 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes).  Below -87 zero is near enough, above 88 it is inf.
inline F exp(F a) {
  F x = larger(smaller(a, every(89.0f)), every(-104.0f));
  F shifted = x * LOG2E + 12582912.0f;  // 1.5 * 2^23: the sum's last bits are the nearest integer
  F n = shifted - 12582912.0f;
  F r = x - n * LN2_HIGH - n * LN2_LOW;
  F p = every(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  I whole = __builtin_convertvector(n, I), half = whole >> 1;  // 2^n in two steps, for the ends of the range
  F scaled = p * (F)((half + 127) << 23) * (F)((whole - half + 127) << 23);
  return a == a ? scaled : a;
}

inline F sigmoid(F a) { return 1.0f / (1.0f + exp(-a)); }

inline F magnitude(F a) { return (F)((I)a & 0x7fffffff); }

// A series near 0, where 1 - exp(-2a) would lose digits.
inline F tanh(F a) {
  F square = a * a;
  F series = a * (1 - square * (1 / 3.f - square * (2 / 15.f - square * (17 / 315.f - square * (62 / 2835.f)))));
  F e = exp(-2 * magnitude(a));
  F far = (1 - e) / (1 + e);
  return magnitude(a) < 0.15f ? series : (a < 0 ? -far : far);
}

// 1 - tanh(a)^2, without the difference.
inline F dtanh(F a) {
  F e = exp(-2 * magnitude(a));
  return 4 * e / ((1 + e) * (1 + e));
}

// log(1 + a) for 0 <= a <= 1: 2 atanh(a / (2 + a)).
inline F log1p(F a) {
  F s = a / (2 + a), q = s * s;
  F p = every(2 / 15.f);
  p = p * q + 2 / 13.f;
  p = p * q + 2 / 11.f;
  p = p * q + 2 / 9.f;
  p = p * q + 2 / 7.f;
  p = p * q + 2 / 5.f;
  p = p * q + 2 / 3.f;
  return s * (p * q + 2);
}

inline F log1p_exp(F a) { return larger(a, zero()) + log1p(exp(-magnitude(a))); }

// exp(a) - 1 for a <= 0.
inline F expm1(F a) {
  F series = a * (1 + a * (0.5f + a * (1 / 6.f + a * (1 / 24.f + a * (1 / 120.f + a * (1 / 720.f))))));
  return a > -0.25f ? series : exp(a) - 1;
}

// Of the normal distribution: the Taylor series of erf near 0, and beyond it exp(p(1 / (1 + z / 2)) - z^2) with the
// coefficients of Numerical Recipes' erfcc, which is within 1.2e-7 of the value.
inline F cdf(F a) {
  F z = a * 0.70710678f, m = magnitude(z), q = z * z;
  F s = every(-1 / 75600.f);
  s = s * q + 1 / 9360.f;
  s = s * q - 1 / 1320.f;
  s = s * q + 1 / 216.f;
  s = s * q - 1 / 42.f;
  s = s * q + 1 / 10.f;
  s = s * q - 1 / 3.f;
  s = s * q + 1;
  F near = 0.5f + 0.56418958f * z * s;
  F t = 1 / (1 + 0.5f * m);
  F p = every(0.17087277f);
  p = p * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  F tail = 0.5f * t * exp(p - q);
  return m < 0.75f ? near : (z < 0 ? tail : 1 - tail);
}

inline F clamp(F a, float low, float high) { return a < low ? every(low) : (a > high ? every(high) : a); }
inline F at_most(F a, float high) { return a > high ? every(high) : a; }
inline F positive(F a) { return a < 0 ? zero() : a; }

inline F step(I condition, float yes, float no) { return condition ? every(yes) : every(no); }

struct Silu {
  static F of(F a, float) { return a * sigmoid(a); }
  static F slope(F a, float) {
    F s = sigmoid(a);
    return s * (1 + a * (1 - s));
  }
};
struct Gelu {
  static F of(F a, float) { return a * cdf(a); }
  static F slope(F a, float) { return cdf(a) + a * exp(-0.5f * a * a) * 0.3989422804f; }
};
struct GeluTanh {  // (1 + tanh(z)) / 2 is sigmoid(2z)
  static F of(F a, float) { return a * sigmoid(1.5957691216f * (a + 0.044715f * a * a * a)); }
  static F slope(F a, float) {
    F s = sigmoid(1.5957691216f * (a + 0.044715f * a * a * a));
    return s * (1 + a * (1 - s) * 1.5957691216f * (1 + 0.134145f * a * a));
  }
};
struct Swish {
  static F of(F a, float beta) { return a * sigmoid(beta * a); }
  static F slope(F a, float beta) {
    F s = sigmoid(beta * a);
    return s * (1 + beta * a * (1 - s));
  }
};
struct QuickGelu {
  static F of(F a, float) { return Swish::of(a, 1.702f); }
  static F slope(F a, float) { return Swish::slope(a, 1.702f); }
};
struct Relu {
  static F of(F a, float) { return positive(a); }
  static F slope(F a, float) { return step(a > 0, 1, 0); }
};
struct Relu2 {
  static F of(F a, float) { return positive(a) * positive(a); }
  static F slope(F a, float) { return 2 * positive(a); }
};
struct Sigmoid {
  static F of(F a, float) { return sigmoid(a); }
  static F slope(F a, float) {
    F s = sigmoid(a);
    return s * (1 - s);
  }
};
struct Tanh {
  static F of(F a, float) { return tanh(a); }
  static F slope(F a, float) { return dtanh(a); }
};
struct Identity {
  static F of(F a, float) { return a; }
  static F slope(F, float) { return every(1); }
};
struct LeakyRelu {
  static F of(F a, float slope) { return a > 0 ? a : slope * a; }
  static F slope(F a, float slope) { return step(a > 0, 1, slope); }
};
struct Elu {
  static F of(F a, float alpha) { return a > 0 ? a : alpha * expm1(smaller(a, zero())); }
  static F slope(F a, float alpha) { return a > 0 ? every(1) : alpha * exp(smaller(a, zero())); }
};
struct Selu {
  static F of(F a, float) { return 1.05070099f * Elu::of(a, 1.67326324f); }
  static F slope(F a, float) { return 1.05070099f * Elu::slope(a, 1.67326324f); }
};
struct Softplus {  // 20: where torch turns linear
  static F of(F a, float beta) { return a * beta > 20 ? a : log1p_exp(a * beta) / beta; }
  static F slope(F a, float beta) { return a * beta > 20 ? every(1) : sigmoid(a * beta); }
};
struct Softsign {
  static F of(F a, float) { return a / (1 + magnitude(a)); }
  static F slope(F a, float) { return 1 / ((1 + magnitude(a)) * (1 + magnitude(a))); }
};
struct Relu6 {
  static F of(F a, float) { return clamp(a, 0, 6); }
  static F slope(F a, float) { return step((a > 0) & (a < 6), 1, 0); }
};
struct Hardswish {
  static F of(F a, float) { return a * clamp(a + 3, 0, 6) / 6; }
  static F slope(F a, float) { return a < 3 ? (a > -3 ? a / 3 + 0.5f : zero()) : every(1); }
};
struct Hardsigmoid {
  static F of(F a, float) { return clamp(a + 3, 0, 6) / 6; }
  static F slope(F a, float) { return step((a > -3) & (a < 3), 1 / 6.f, 0); }
};
struct Mish {
  static F of(F a, float) { return a * tanh(log1p_exp(a)); }
  static F slope(F a, float) {
    F s = log1p_exp(a);
    return tanh(s) + a * dtanh(s) * sigmoid(a);
  }
};

// ``back`` turns (gate, up) and the gradient of hidden into the gradients of gate and of up.
template <class Act>
struct Alone {
  static F of(F gate, F, float p0, float) { return Act::of(gate, p0); }
  static void back(F d, F gate, F, float p0, float, F& dgate, F& dup) {
    dgate = d * Act::slope(gate, p0);
    dup = zero();
  }
};
template <class Act>
struct Gated {
  static F of(F gate, F up, float p0, float) { return Act::of(gate, p0) * up; }
  static void back(F d, F gate, F up, float p0, float, F& dgate, F& dup) {
    dgate = d * up * Act::slope(gate, p0);
    dup = d * Act::of(gate, p0);
  }
};
struct SwigluClamp {
  static F of(F gate, F up, float most, float) {
    F g = at_most(gate, most);
    return g * sigmoid(g) * clamp(up, -most, most);
  }
  static void back(F d, F gate, F up, float most, float, F& dgate, F& dup) {
    F g = at_most(gate, most);
    dgate = d * clamp(up, -most, most) * Silu::slope(g, 0) * step(gate <= most, 1, 0);
    dup = d * Silu::of(g, 0) * step((up >= -most) & (up <= most), 1, 0);
  }
};
struct SwigluStep {
  static F of(F gate, F up, float most, float) {
    return at_most(gate * sigmoid(gate), most) * clamp(up, -most, most);
  }
  static void back(F d, F gate, F up, float most, float, F& dgate, F& dup) {
    F s = Silu::of(gate, 0);
    dgate = d * clamp(up, -most, most) * Silu::slope(gate, 0) * step(s <= most, 1, 0);
    dup = d * at_most(s, most) * step((up >= -most) & (up <= most), 1, 0);
  }
};
struct SwigluOai {
  static F of(F gate, F up, float alpha, float most) {
    return Swish::of(at_most(gate, most), alpha) * (clamp(up, -most, most) + 1);
  }
  static void back(F d, F gate, F up, float alpha, float most, F& dgate, F& dup) {
    F g = at_most(gate, most);
    dgate = d * (clamp(up, -most, most) + 1) * Swish::slope(g, alpha) * step(gate <= most, 1, 0);
    dup = d * Swish::of(g, alpha) * step((up >= -most) & (up <= most), 1, 0);
  }
};
struct SwigluSoftcap {
  static F of(F gate, F up, float p0, float p1) {
    return p0 * tanh(gate / p0) * sigmoid(gate) * (p1 * tanh(up / p1));
  }
  static void back(F d, F gate, F up, float p0, float p1, F& dgate, F& dup) {
    F t = tanh(gate / p0), s = sigmoid(gate);
    dgate = d * (p1 * tanh(up / p1)) * s * (dtanh(gate / p0) + p0 * t * (1 - s));
    dup = d * p0 * t * s * dtanh(up / p1);
  }
};

// n numbers of each, n a multiple of LANES; hidden in the place of gate.
using Activation = void (*)(float* gate, const float* up, int64_t n, float p0, float p1);
// The gradients of gate and up in their places; dhidden becomes hidden.
using Derivative = void (*)(float* dhidden, float* gate, float* up, int64_t n, float p0, float p1);

template <class Act>
void activate(float* gate, const float* up, int64_t n, float p0, float p1) {
  for (int64_t i = 0; i < n; i += LANES) store(gate + i, Act::of(load(gate + i), load(up + i), p0, p1));
}

template <class Act>
void derive(float* dhidden, float* gate, float* up, int64_t n, float p0, float p1) {
  for (int64_t i = 0; i < n; i += LANES) {
    F d = load(dhidden + i), g = load(gate + i), u = load(up + i), dgate, dup;
    Act::back(d, g, u, p0, p1, dgate, dup);
    store(dhidden + i, Act::of(g, u, p0, p1));
    store(gate + i, dgate);
    store(up + i, dup);
  }
}

struct Pass {
  Activation forward;
  Derivative backward;
};

#define ONE(Act) {activate<Act>, derive<Act>}
#define BOTH(Act) ONE(Alone<Act>), ONE(Gated<Act>)
#define GATED(Act) {nullptr, nullptr}, ONE(Act)
constexpr Pass LIST[] = {  // of each name without the gate, then with it
    BOTH(Silu), BOTH(Gelu), BOTH(GeluTanh), BOTH(QuickGelu), BOTH(Relu), BOTH(Relu2), BOTH(Sigmoid), BOTH(Tanh),
    BOTH(Identity), BOTH(LeakyRelu), BOTH(Elu), BOTH(Selu), BOTH(Softplus), BOTH(Softsign), BOTH(Swish), BOTH(Relu6),
    BOTH(Hardswish), BOTH(Hardsigmoid), BOTH(Mish),
    GATED(SwigluClamp), GATED(SwigluStep), GATED(SwigluOai), GATED(SwigluSoftcap),
};
#undef ONE
#undef BOTH
#undef GATED

}  // namespace moe_fx
