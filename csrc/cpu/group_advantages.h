// Rewards normalised within their group, in place; NaN marks a missing reward.
#pragma once

#include <cmath>
#include <cstdint>

namespace grpo {

enum ScaleRewards { kGroup, kBatch, kNone };  // in the order of op.SCALE_REWARDS

struct Moments {
  double mean = 0;
  double std = 0;  // unbiased; 0 where fewer than two values are left
  bool all_equal = true;
};

template <class R>
Moments moments(const R* values, int64_t count, int64_t stride) {
  double sum = 0, low = INFINITY, high = -INFINITY;
  int64_t present = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double v = values[i * stride];
    if (std::isnan(v)) continue;
    sum += v;
    low = std::fmin(low, v);
    high = std::fmax(high, v);
    ++present;
  }
  Moments m;
  m.mean = present ? sum / static_cast<double>(present) : NAN;
  m.all_equal = low >= high;
  double squares = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double d = values[i * stride] - m.mean;
    if (!std::isnan(d)) squares += d * d;
  }
  m.std = present > 1 ? std::sqrt(squares / static_cast<double>(present - 1)) : 0;
  return m;
}

// In place: each group of `size` values, `stride` apart, centred and divided.
template <class R>
void normalize(R* values, int64_t count, int64_t stride, int64_t size, int64_t scale_rewards, double eps) {
  const double batch_std = scale_rewards == kBatch ? moments(values, count, stride).std : 0;
  for (int64_t begin = 0; begin < count; begin += size) {
    R* group = values + begin * stride;
    const Moments m = moments(group, size, stride);
    const double divisor = scale_rewards == kNone ? 1 : (scale_rewards == kBatch ? batch_std : m.std) + eps;
    for (int64_t i = 0; i < size; ++i) {
      R& v = group[i * stride];
      if (!std::isnan(v)) v = static_cast<R>(m.all_equal ? 0 : (v - m.mean) / divisor);
    }
  }
}

// A missing reward's advantage is 0.
template <class R>
void zero_missing(R* advantages, int64_t count) {
  for (int64_t i = 0; i < count; ++i) advantages[i] = std::isnan(advantages[i]) ? R(0) : advantages[i];
}

}  // namespace grpo
