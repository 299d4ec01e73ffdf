// Elements of a row: loads of 16 bytes or of one element, conversion to the arithmetic type and back, the transform.
#pragma once

#include <cstring>
#include <type_traits>

#include "device.h"

namespace grpo::cuda {

// How a row is read: 16 bytes at a time, or one element at a time if it is not aligned.
enum class Access { kVector, kElement };

enum class Curve { kPlain, kSoftcap };

// y = outer v(z), where v is z or tanh(inner z). rate = outer log2 e; slope is dy/dz at v = 0.
template <class R>
struct RowTransform {
  Curve curve;
  R inner;
  R rate;
  R slope;
};

// Error at most 2 ulp. A polynomial near 0, where the exponential form cancels.
__device__ __forceinline__ float tanh_of(float x) {
  const float s = x * x;  // (tanh(x) / x - 1) / x^2 at Chebyshev's nodes of |x| < 0.55
  const float series = (((-0.0066102277f * s + 0.021309389f) * s - 0.05390943f) * s + 0.13333113f) * s - 0.3333333f;
  const float far = 1.0f - 2.0f / (exp2_fast(fabsf(x) * 2.885390081777927f) + 1.0f);
  return fabsf(x) < 0.55f ? x + x * s * series : copysignf(far, x);
}
__device__ __forceinline__ double tanh_of(double x) { return tanh(x); }

// v of a logit. kPlain: the curve is kPlain at compile time.
template <bool kPlain, class R>
__device__ __forceinline__ R apply_curve(R z, const RowTransform<R>& f) {
  if constexpr (kPlain) return z;
  return f.curve == Curve::kSoftcap ? tanh_of(z * f.inner) : z;
}

// dy/dz at v.
template <bool kPlain, class R>
__device__ __forceinline__ R slope_at(R v, const RowTransform<R>& f) {
  if constexpr (kPlain) return f.slope;
  return f.curve == Curve::kSoftcap ? f.slope * (R(1) - v * v) : f.slope;
}

// ---- packets: adjacent elements, 16 bytes or one element

template <class T, Access kAccess>
constexpr int kWidth = kAccess == Access::kVector ? 16 / static_cast<int>(sizeof(T)) : 1;

template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Packet {
  T values[kCount];
};

template <class T>
__device__ __forceinline__ Arithmetic<T> element(T x) {
  if constexpr (std::is_same_v<T, Arithmetic<T>>) return x;
  else return widened(x);
}

template <class T>
__device__ __forceinline__ T rounded(Arithmetic<T> x) {
  if constexpr (std::is_same_v<T, Arithmetic<T>>) return x;
  else return nearest(x, T{});
}

template <class T, int kCount>
__device__ __forceinline__ void unpack(const Packet<T, kCount>& packet, Arithmetic<T> (&out)[kCount]) {
  if constexpr (sizeof(T) == 2 && kCount > 1) {
    uint32_t words[kCount / 2];
    memcpy(words, &packet, sizeof(packet));
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      out[2 * i] = low_of(words[i], T{});
      out[2 * i + 1] = high_of(words[i], T{});
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = element(packet.values[i]);
  }
}

template <class Out, int kCount, class R>
__device__ __forceinline__ Packet<Out, kCount> packed(const R (&values)[kCount]) {
  Packet<Out, kCount> packet;
  if constexpr (sizeof(Out) == 2 && kCount > 1) {
    uint32_t words[kCount / 2];
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) words[i] = pack_two<Out>(values[2 * i], values[2 * i + 1]);
    memcpy(&packet, words, sizeof(packet));
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) packet.values[i] = rounded<Out>(values[i]);
  }
  return packet;
}

// The largest v of a packet, ignoring NaN.
template <bool kPlain, class T, int kCount>
__device__ __forceinline__ Arithmetic<T> packet_max(const Packet<T, kCount>& packet,
                                                    const RowTransform<Arithmetic<T>>& f) {
  if constexpr (kPlain && sizeof(T) == 2 && kCount > 1) {  // two at a time
    uint32_t words[kCount / 2];
    memcpy(words, &packet, sizeof(packet));
#pragma unroll
    for (int i = 1; i < kCount / 2; ++i) words[0] = max_of_two<T>(words[0], words[i]);
    return max_of_numbers(low_of(words[0], T{}), high_of(words[0], T{}));
  } else {
    Arithmetic<T> z[kCount];
    unpack(packet, z);
    Arithmetic<T> largest = apply_curve<kPlain>(z[0], f);
#pragma unroll
    for (int i = 1; i < kCount; ++i) largest = max_of_numbers(largest, apply_curve<kPlain>(z[i], f));
    return largest;
  }
}

}  // namespace grpo::cuda
