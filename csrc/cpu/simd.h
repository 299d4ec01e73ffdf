// Vectors as extensions of GCC and Clang, as wide as the instruction set this file is compiled for.
//
// row_kernels.cpp is compiled once per instruction set, with GRPO_ISA defined. No other file may include this one.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns about operands that its own header leaves undefined on purpose (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

#include "dtypes.h"

namespace grpo::GRPO_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;  // SSE2, NEON
#endif

template <class R>
constexpr int kLanes = kVectorBytes / sizeof(R);

template <class R, int bytes = kVectorBytes>
struct VectorOf {
  typedef R type __attribute__((vector_size(bytes)));
};
using F32 = VectorOf<float>::type;
using I32 = VectorOf<int32_t>::type;
using U32 = VectorOf<uint32_t>::type;
using F64 = VectorOf<double>::type;
using U16Half = VectorOf<uint16_t, kVectorBytes / 2>::type;  // has the lanes of F32

template <class R>
using Vector = typename VectorOf<R>::type;

template <class V>
inline V load_bytes(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

template <class V>
inline void store_bytes(void* to, V v) {
  std::memcpy(to, &v, sizeof(V));
}

template <class To, class From>
inline To bits(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &v, sizeof(To));
  return to;
}

template <class R>
inline Vector<R> splat(R x) {
  return Vector<R>{} + x;
}

// ---- loads and stores: storage type to arithmetic type and back, rounding to nearest even

inline F32 load(const float* p) { return load_bytes<F32>(p); }
inline F64 load(const double* p) { return load_bytes<F64>(p); }
inline U32 widen(const void* p);               // one uint16 per lane of F32
inline void store_narrow(void* p, U32 values);  // each below 2^16

inline F32 load(const BFloat16* p) { return bits<F32>(widen(p) << 16); }

inline void store(float* p, F32 v) { store_bytes(p, v); }
inline void store(double* p, F64 v) { store_bytes(p, v); }
inline void store(BFloat16* p, F32 v) {
  const U32 u = bits<U32>(v);
  const U32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const U32 nan = (u >> 16) | 0x40u;
  store_narrow(p, v != v ? nan : rounded);
}

#if defined(__AVX512F__)

inline U32 widen(const void* p) { return bits<U32>(_mm512_cvtepu16_epi32(load_bytes<__m256i>(p))); }
inline void store_narrow(void* p, U32 v) { store_bytes(p, _mm512_cvtepi32_epi16(bits<__m512i>(v))); }
inline F32 load(const Half* p) { return _mm512_cvtph_ps(load_bytes<__m256i>(p)); }
inline void store(Half* p, F32 v) { store_bytes(p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }

#elif defined(__AVX2__)

inline U32 widen(const void* p) { return bits<U32>(_mm256_cvtepu16_epi32(load_bytes<__m128i>(p))); }
inline void store_narrow(void* p, U32 v) {
  const __m256i u = bits<__m256i>(v);
  store_bytes(p, _mm_packus_epi32(_mm256_castsi256_si128(u), _mm256_extracti128_si256(u, 1)));
}
inline F32 load(const Half* p) { return _mm256_cvtph_ps(load_bytes<__m128i>(p)); }
inline void store(Half* p, F32 v) { store_bytes(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }

#else

inline U32 widen(const void* p) { return __builtin_convertvector(load_bytes<U16Half>(p), U32); }
inline void store_narrow(void* p, U32 v) { store_bytes(p, __builtin_convertvector(v, U16Half)); }

inline F32 load(const Half* p) {
  const U32 h = widen(p);
  const U32 sign = (h & 0x8000u) << 16;
  // moving exponent and mantissa to fp32's bits gives the value times 2^-112; subnormals become normal
  const F32 magnitude = bits<F32>((h & 0x7fffu) << 13) * 0x1p112f;
  const U32 special = (h & 0x7fffu) >= 0x7c00u ? U32{} + 0x7f800000u : U32{};
  return bits<F32>(bits<U32>(magnitude) | special | sign);
}
inline void store(Half* p, F32 v) {
  const U32 u = bits<U32>(v);
  const U32 sign = (u >> 16) & 0x8000u;
  const U32 a = u & 0x7fffffffu;
  // below 2^-14: adding 2^-1 rounds the value to even, in units of 2^-24 (fp16's subnormal step), in the low bits
  const U32 subnormal = bits<U32>(bits<F32>(a) + 0.5f) - 0x3f000000u;
  const U32 normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  U32 h = a < 0x38800000u ? subnormal : normal;
  h = a >= 0x477ff000u ? U32{} + 0x7c00u : h;  // would round to more than 65504
  h = a > 0x7f800000u ? U32{} + 0x7e00u : h;
  store_narrow(p, h | sign);
}

#endif

// ---- arithmetic

// The larger one; b if either is NaN.
#if defined(__AVX512F__)
inline F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
#elif defined(__AVX2__)
inline F32 max(F32 a, F32 b) { return _mm256_max_ps(a, b); }
#else
inline F32 max(F32 a, F32 b) { return a > b ? a : b; }
#endif
inline F64 max(F64 a, F64 b) { return a > b ? a : b; }

// e^x for x <= 88. Relative error below 1.2e-7 (2 ulp); exactly 0 below -87.33, -inf included; NaN stays NaN.
inline F32 exp(F32 x) {
  const F32 magic = splat(0x1.8p23f);  // adding it rounds to an integer, because its last bit is worth 1
  const F32 shifted = x * 1.44269504f + magic;
  const F32 n = shifted - magic;
  F32 r = x - n * 0.693359375f;  // ln 2 in two parts; n times the first is exact
  r = r + n * 2.12194440e-4f;
  // minimax on |r| <= ln 2 / 2, of relative error 3.1e-9 before rounding
  F32 p = splat(1.3814539e-3f);
  p = p * r + 8.368745e-3f;
  p = p * r + 4.166839e-2f;
  p = p * r + 1.6666521e-1f;
  p = p * r + 4.9999994e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // the low bits of `shifted` are n. 2^n is a factor, not added to the exponent bits, so that NaN stays NaN.
  const F32 power = bits<F32>((bits<I32>(shifted) << 23) + 0x3f800000);
  return x < -87.33f ? F32{} : p * power;
}

// tanh x. Absolute error below 1.5e-7, relative error below 3e-7.
inline F32 tanh(F32 x) {
  const F32 magnitude = bits<F32>(bits<U32>(x) & 0x7fffffffu);
  const F32 bounded = magnitude > 9.1f ? splat(9.1f) : magnitude;  // tanh 9.1 rounds to 1
  const F32 large = 1.0f - 2.0f / (exp(bounded + bounded) + 1.0f);
  const F32 s = x * x;
  F32 p = splat(-5.70498872745e-3f);
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  const F32 small = x + x * s * p;
  const F32 signed_large = bits<F32>(bits<U32>(large) | (bits<U32>(x) & 0x80000000u));
  const F32 y = magnitude < 0.625f ? small : signed_large;
  return x != x ? x : y;
}

// log x for normal x > 0. Relative error below 3e-7, also near 1.
inline F32 log(F32 x) {
  const I32 exponent = (bits<I32>(x) - 0x3f400000) >> 23;  // for a mantissa in [0.75, 1.5)
  const F32 y = bits<F32>(bits<I32>(x) - (exponent << 23)) - 1.0f;
  const F32 t = y / (2.0f + y);  // log(1 + y) = 2 atanh t
  const F32 s = t * t;
  F32 p = splat(1.0f / 9);
  p = p * s + 1.0f / 7;
  p = p * s + 1.0f / 5;
  p = p * s + 1.0f / 3;
  p = p * s + 1.0f;
  return __builtin_convertvector(exponent, F32) * 0.693147181f + (t + t) * p;
}

// fp64 is for tests: the C library's functions, lane by lane.
inline F64 exp(F64 x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}
inline F64 tanh(F64 x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::tanh(x[i]);
  return x;
}
inline F64 log(F64 x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::log(x[i]);
  return x;
}

}  // namespace grpo::GRPO_ISA
