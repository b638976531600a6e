// One vector of floats as wide as the machine's, and the numbers of memory that become one.
//
// Written with the compiler's vector types, so that it is the same text for AVX2, AVX-512 and NEON; a product and a sum
// become one instruction by -ffp-contract=fast.  Intrinsics stand where a type has an instruction of its own.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moe_fx {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float F __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef uint16_t Half __attribute__((vector_size(2 * LANES)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class V, class T>
inline V raw(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline F load(const float* p) { return raw<F>(p); }
inline F load(const bf16* p) { return (F)(__builtin_convertvector(raw<Half>(p), U) << 16); }

inline F load(const f16* p) {
#if defined(__AVX512F__)
  return (F)_mm512_cvtph_ps(raw<__m256i>(p));
#elif defined(__F16C__)
  return (F)_mm256_cvtph_ps(raw<__m128i>(p));
#elif defined(__ARM_NEON)
  return (F)vcvt_f32_f16(raw<float16x4_t>(p));
#else
#error "no conversion from float16 on this machine"
#endif
}

inline void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }

inline void store(bf16* p, F v) {
#if defined(__AVX512BF16__)
  __m256bh half = _mm512_cvtneps_pbh((__m512)v);
#else
  U u = (U)v;
  U even = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  U quiet = (u >> 16) | 0x40;  // of a NaN, which the sum could make infinite
  Half half = __builtin_convertvector(v == v ? even : quiet, Half);
#endif
  std::memcpy(p, &half, sizeof half);
}

inline void store(f16* p, F v) {
#if defined(__AVX512F__)
  __m256i half = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  __m128i half = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__ARM_NEON)
  float16x4_t half = vcvt_f16_f32((float32x4_t)v);
#endif
  std::memcpy(p, &half, sizeof half);
}

// The first n of them; zeros after.
template <class T>
inline F load_part(const T* p, int n) {
  T all[LANES] = {};
  std::memcpy(all, p, n * sizeof(T));
  return load(all);
}

template <class T>
inline void store_part(T* p, F v, int n) {
  T all[LANES];
  store(all, v);
  std::memcpy(p, all, n * sizeof(T));
}

inline F zero() { return F{}; }

// To the bit, whatever the lane holds.
inline F every(float v) {
#if defined(__AVX512F__)
  return (F)_mm512_set1_ps(v);
#elif defined(__AVX2__)
  return (F)_mm256_set1_ps(v);
#else
  F all;
  for (int i = 0; i < LANES; i++) all[i] = v;
  return all;
#endif
}

inline float sum(F v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float all[LANES];
  store(all, v);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; i++) all[i] += all[i + width];
  return all[0];
#endif
}

// The sums of four vectors.
inline void sums(const F (&v)[4], float* out) {
#if defined(__AVX512F__)
  auto low = [](F a, F b) { return (F)_mm512_unpacklo_ps((__m512)a, (__m512)b); };
  auto high = [](F a, F b) { return (F)_mm512_unpackhi_ps((__m512)a, (__m512)b); };
  F ab = low(v[0], v[1]) + high(v[0], v[1]), cd = low(v[2], v[3]) + high(v[2], v[3]);
  F four = (F)_mm512_unpacklo_pd((__m512d)ab, (__m512d)cd) + (F)_mm512_unpackhi_pd((__m512d)ab, (__m512d)cd);
  __m256 two = _mm512_castps512_ps256((__m512)four) + _mm512_extractf32x8_ps((__m512)four, 1);
  _mm_storeu_ps(out, _mm256_castps256_ps128(two) + _mm256_extractf128_ps(two, 1));
#else
  for (int i = 0; i < 4; i++) out[i] = sum(v[i]);
#endif
}

inline F smaller(F a, F b) { return a < b ? a : b; }
inline F larger(F a, F b) { return a > b ? a : b; }

}  // namespace moe_fx
