// Rewards normalised within their group, for host and device. NaN marks a missing reward. The only C++ copy.
#pragma once

#include <cmath>
#include <cstdint>

#include "policy_math.h"

namespace grpo {

enum ScaleRewards { kGroup, kBatch, kNone };              // in the order of SCALE_REWARDS
enum Aggregation { kSumThenNormalize, kNormalizeThenSum };  // in the order of AGGREGATIONS

// Sums over the rewards of a group, without the missing ones.
struct RewardSums {
  double sum = 0, low = INFINITY, high = -INFINITY;
  int64_t present = 0;

  GRPO_HOST_DEVICE void add(double reward) {
    if (std::isnan(reward)) return;
    sum += reward;
    low = std::fmin(low, reward);
    high = std::fmax(high, reward);
    ++present;
  }

  GRPO_HOST_DEVICE void merge(const RewardSums& other) {
    sum += other.sum;
    low = std::fmin(low, other.low);
    high = std::fmax(high, other.high);
    present += other.present;
  }

  GRPO_HOST_DEVICE double mean() const { return present ? sum / static_cast<double>(present) : NAN; }
};

// (reward - mean)^2; 0 for a missing reward.
GRPO_HOST_DEVICE double squared_deviation(double reward, double mean) {
  const double d = reward - mean;
  return std::isnan(d) ? 0 : d * d;
}

struct Moments {
  double mean;
  double std;  // unbiased; 0 if fewer than two rewards are present
  bool all_equal;

  GRPO_HOST_DEVICE Moments(const RewardSums& sums, double squares)
      : mean(sums.mean()),
        std(sums.present > 1 ? std::sqrt(squares / static_cast<double>(sums.present - 1)) : 0),
        all_equal(sums.low >= sums.high) {}

  // The same with mean 0. For sums of normalised rewards: their batch mean is 0 up to rounding.
  GRPO_HOST_DEVICE Moments around_zero() const {
    Moments m = *this;
    m.mean = 0;
    return m;
  }

  // (reward - mean) / divisor; 0 if all rewards are equal. A missing reward stays NaN.
  GRPO_HOST_DEVICE double normalized(double reward, double divisor) const {
    if (std::isnan(reward)) return reward;
    return all_equal ? 0 : (reward - mean) / divisor;
  }
};

// Moments of `count` values that are `stride` apart, computed by one thread.
template <class R>
GRPO_HOST_DEVICE Moments moments(const R* values, int64_t count, int64_t stride) {
  RewardSums sums;
  for (int64_t i = 0; i < count; ++i) sums.add(values[i * stride]);
  const double mean = sums.mean();
  double squares = 0;
  for (int64_t i = 0; i < count; ++i) squares += squared_deviation(values[i * stride], mean);
  return Moments(sums, squares);
}

// Weighted sum over the reward functions, without the missing ones; NaN if all are missing. Null weights count as 1.
// Summed in fp64 and rounded once, so the same rewards have the same sum in any order.
template <class R>
GRPO_HOST_DEVICE R weighted_sum(const R* row, const R* weights, int64_t functions) {
  double sum = 0;
  bool is_scored = false;
  for (int64_t k = 0; k < functions; ++k) {
    if (std::isnan(row[k])) continue;
    sum += weights ? static_cast<double>(row[k]) * static_cast<double>(weights[k]) : static_cast<double>(row[k]);
    is_scored = true;
  }
  return is_scored ? static_cast<R>(sum) : R(NAN);
}

// A missing reward's advantage is 0.
template <class R>
GRPO_HOST_DEVICE R zero_if_missing(R advantage) {
  return std::isnan(advantage) ? R(0) : advantage;
}

}  // namespace grpo
