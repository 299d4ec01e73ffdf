// Normalises groups of rewards in place, one after the other.
#pragma once

#include <cstdint>

#include "rewards.h"

namespace grpo {

// Centres and divides each group of `size` values that are `stride` apart. `mean_is_zero`: take every mean to be 0.
template <class R>
void normalize(R* values, int64_t count, int64_t stride, int64_t size, int64_t scale_rewards, double eps,
               bool mean_is_zero = false) {
  const double batch_std = scale_rewards == kBatch ? moments(values, count, stride).std : 0;
  for (int64_t begin = 0; begin < count; begin += size) {
    R* group = values + begin * stride;
    const Moments group_moments = moments(group, size, stride);
    const Moments m = mean_is_zero ? group_moments.around_zero() : group_moments;
    const double divisor = scale_rewards == kNone ? 1 : (scale_rewards == kBatch ? batch_std : m.std) + eps;
    for (int64_t i = 0; i < size; ++i) group[i * stride] = static_cast<R>(m.normalized(group[i * stride], divisor));
  }
}

template <class R>
void zero_missing(R* advantages, int64_t count) {
  for (int64_t i = 0; i < count; ++i) advantages[i] = zero_if_missing(advantages[i]);
}

}  // namespace grpo
