// Groups of rewards normalised in place, one after the other.
#pragma once

#include <cstdint>

#include "rewards.h"

namespace grpo {

// Each group of `size` values, `stride` apart, centred and divided. With `mean_is_zero` a mean is 0 but for rounding.
template <class R>
void normalize(R* values, int64_t count, int64_t stride, int64_t size, int64_t scale_rewards, double eps,
               bool mean_is_zero = false) {
  const double batch_std = scale_rewards == kBatch ? moments(values, count, stride).std : 0;
  for (int64_t begin = 0; begin < count; begin += size) {
    R* group = values + begin * stride;
    const Moments of_group = moments(group, size, stride);
    const Moments m = mean_is_zero ? of_group.around_zero() : of_group;
    const double divisor = scale_rewards == kNone ? 1 : (scale_rewards == kBatch ? batch_std : m.std) + eps;
    for (int64_t i = 0; i < size; ++i) group[i * stride] = static_cast<R>(m.normalized(group[i * stride], divisor));
  }
}

template <class R>
void zero_missing(R* advantages, int64_t count) {
  for (int64_t i = 0; i < count; ++i) advantages[i] = zero_if_missing(advantages[i]);
}

}  // namespace grpo
