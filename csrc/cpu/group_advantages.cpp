// group_advantages: rewards normalised within their group; NaN marks a missing reward.
#include <cmath>
#include <vector>

#include "tensors.h"

namespace grpo {
namespace {

enum ScaleRewards { kGroup, kBatch, kNone };                // in the order of op.SCALE_REWARDS
enum Aggregation { kSumThenNormalize, kNormalizeThenSum };  // in the order of op.AGGREGATIONS

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

template <class R>
void run(const R* rewards, const R* weights, int64_t count, int64_t functions, int64_t size, int64_t scale_rewards,
         int64_t aggregation, double eps, R* out) {
  std::vector<R> table(rewards, rewards + count * functions);
  if (aggregation == kNormalizeThenSum) {
    for (int64_t k = 0; k < functions; ++k) normalize(table.data() + k, count, functions, size, kGroup, eps);
  }
  for (int64_t i = 0; i < count; ++i) {
    R sum = 0;
    bool scored = false;
    for (int64_t k = 0; k < functions; ++k) {
      const R v = table[i * functions + k];
      if (std::isnan(v)) continue;
      sum += v * weights[k];
      scored = true;
    }
    out[i] = scored ? sum : R(NAN);
  }
  if (aggregation == kNormalizeThenSum) {
    normalize(out, count, 1, count, kGroup, eps);
  } else {
    normalize(out, count, 1, size, scale_rewards, eps);
  }
  for (int64_t i = 0; i < count; ++i) out[i] = std::isnan(out[i]) ? R(0) : out[i];
}

}  // namespace

Tensor group_advantages(const Tensor& rewards,  // [B, K]
                        const Tensor& weights,  // [K]
                        int64_t num_generations, int64_t scale_rewards, int64_t aggregation, double eps) {
  const int64_t count = rewards.size(0), functions = rewards.size(1);
  STD_TORCH_CHECK(num_generations > 0 && count % num_generations == 0, num_generations, " must divide ", count);
  const Tensor out = empty({count}, rewards.scalar_type());
  const auto typed = [&]<class R>(R) {
    run<R>(data<R>(rewards, count * functions), data<R>(weights, functions), count, functions, num_generations, scale_rewards, aggregation, eps,
           mutable_data<R>(out));
  };
  rewards.scalar_type() == ScalarType::Double ? typed(double()) : typed(float());
  return out;
}

}  // namespace grpo

STABLE_TORCH_LIBRARY_IMPL(grpo_kernels, CPU, m) { m.impl("group_advantages_cpu", TORCH_BOX(&grpo::group_advantages)); }
