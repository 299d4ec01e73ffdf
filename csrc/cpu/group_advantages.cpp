// group_advantages: rewards normalised within their group. NaN marks a missing reward.
#include "group_advantages.h"

#include <vector>

#include "tensors.h"

namespace grpo {
namespace {

template <class R>
void run(const R* rewards, const R* weights, int64_t count, int64_t functions, int64_t size, int64_t scale_rewards,
         int64_t aggregation, double eps, R* out) {
  std::vector<R> table(rewards, rewards + count * functions);
  if (aggregation == kNormalizeThenSum) {
    for (int64_t k = 0; k < functions; ++k) normalize(table.data() + k, count, functions, size, kGroup, eps);
  }
  for (int64_t i = 0; i < count; ++i) out[i] = weighted_sum(table.data() + i * functions, weights, functions);
  if (aggregation == kNormalizeThenSum) {
    normalize(out, count, 1, count, kGroup, eps, true);
  } else {
    normalize(out, count, 1, size, scale_rewards, eps);
  }
  zero_missing(out, count);
}

}  // namespace

Tensor group_advantages(const Tensor& rewards,  // [B, K]
                        const Tensor& weights,  // [K]
                        int64_t num_generations, int64_t scale_rewards, int64_t aggregation, double eps) {
  const int64_t count = rewards.size(0), functions = rewards.size(1);
  STD_TORCH_CHECK(num_generations > 0 && count % num_generations == 0, num_generations, " must divide ", count);
  const Tensor out = empty({count}, rewards.scalar_type(), rewards);
  const auto typed = [&]<class R>(R) {
    run<R>(data<R>(rewards, count * functions), data<R>(weights, functions), count, functions, num_generations,
           scale_rewards, aggregation, eps, mutable_data<R>(out));
  };
  rewards.scalar_type() == ScalarType::Double ? typed(double()) : typed(float());
  return out;
}

}  // namespace grpo

STABLE_TORCH_LIBRARY_IMPL(grpo_kernels, CPU, m) { m.impl("group_advantages_cpu", TORCH_BOX(&grpo::group_advantages)); }
