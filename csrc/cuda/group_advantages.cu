// group_advantages: rewards normalised within their group, one block per group. NaN marks a missing reward.
#include <cmath>

#include "device.h"
#include "rewards.h"

namespace grpo::cuda {
namespace {

constexpr int kRewardThreads = 128;
constexpr int kRewardWarps = kRewardThreads / kWarp;

// Rewards [batch, functions]; each reward is the weighted sum of `summed` adjacent columns.
template <class R>
struct RewardTable {
  const R* values;
  const R* weights;  // [functions] or null
  int64_t batch, functions, summed;

  __device__ __forceinline__ R at(int64_t row, int64_t column) const {
    return weighted_sum(values + row * functions + column * summed, weights, summed);
  }
};

// Combines the values of the block's threads in a fixed order; every thread gets the result.
template <class T, class Join>
__device__ __forceinline__ T reduce_block(T value, const Join& join) {
  for (int lanes = 1; lanes < kWarp; lanes *= 2) value = join(value, shuffle_xor(value, lanes));
  T* const parts = static_cast<T*>(dynamic_shared());
  __syncthreads();  // the parts of an earlier call have been read
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = parts[0];
  for (int warp = 1; warp < kRewardWarps; ++warp) value = join(value, parts[warp]);
  return value;
}

template <class R>
__device__ Moments moments_of(const RewardTable<R>& table, int64_t begin, int64_t size, int64_t column) {
  RewardSums sums;
  for (int64_t i = threadIdx.x; i < size; i += kRewardThreads) sums.add(table.at(begin + i, column));
  sums = reduce_block(sums, [](RewardSums a, const RewardSums& b) {
    a.merge(b);
    return a;
  });
  double squares = 0;
  for (int64_t i = threadIdx.x; i < size; i += kRewardThreads) {
    squares += squared_deviation(table.at(begin + i, column), sums.mean());
  }
  return Moments(sums, reduce_block(squares, [](double a, double b) { return a + b; }));
}

template <class R>
__global__ void __launch_bounds__(kRewardThreads)
normalize_kernel(RewardTable<R> table, int64_t size, int64_t scale_rewards, double eps, bool mean_is_zero,
                 bool zeroes_missing, R* out, int64_t* first_bad) {
  const int64_t columns = table.functions / table.summed;
  const int64_t column = blockIdx.x % columns, begin = blockIdx.x / columns * size;
  const Moments group_moments = moments_of(table, begin, size, column);
  const Moments group = mean_is_zero ? group_moments.around_zero() : group_moments;
  const double std = scale_rewards == kBatch ? moments_of(table, 0, table.batch, column).std : group.std;
  const double divisor = scale_rewards == kNone ? 1 : std + eps;
  for (int64_t row = begin + threadIdx.x; row < begin + size; row += kRewardThreads) {
    const R reward = table.at(row, column);
    if (std::isinf(reward)) flag(first_bad, kBadReward, row);
    const R advantage = static_cast<R>(group.normalized(reward, divisor));
    out[row * columns + column] = zeroes_missing ? zero_if_missing(advantage) : advantage;
  }
}

template <class R>
void run(const Device& device, const R* rewards, const R* weights, int64_t batch, int64_t functions, int64_t size,
         int64_t scale_rewards, int64_t aggregation, double eps, const Tensor& normalized, R* out) {
  const auto normalize = [&](const RewardTable<R>& table, int64_t size, int64_t scale, bool mean_is_zero,
                             bool zeroes_missing, R* to) {
    const Grid grid{batch / size * (functions / table.summed), kRewardThreads, kRewardWarps * int{sizeof(RewardSums)}};
    launch(device, "group_advantages", {batch, functions}, grid, normalize_kernel<R>, table, size, scale, eps,
           mean_is_zero, zeroes_missing, to, device.first_bad());
  };
  if (aggregation == kNormalizeThenSum) {
    R* const table = mutable_data<R>(normalized);
    normalize({rewards, nullptr, batch, functions, 1}, size, kGroup, false, false, table);
    normalize({table, weights, batch, functions, functions}, batch, kGroup, true, true, out);
  } else {
    normalize({rewards, weights, batch, functions, functions}, size, scale_rewards, false, true, out);
  }
}

}  // namespace

Tensor group_advantages(const Tensor& rewards,  // [B, K]
                        const Tensor& weights,  // [K]
                        int64_t num_generations, int64_t scale_rewards, int64_t aggregation, double eps) {
  const int64_t batch = rewards.size(0), functions = rewards.size(1);
  STD_TORCH_CHECK(num_generations > 0 && batch % num_generations == 0, num_generations, " must divide ", batch);
  const Device device(rewards);
  const ScalarType type = rewards.scalar_type();
  const Tensor out = empty({batch}, type, rewards);
  const Tensor normalized = empty({aggregation == kNormalizeThenSum ? batch * functions : 0}, type, rewards);
  const auto typed = [&]<class R>(R) {
    run<R>(device, data<R>(rewards, batch * functions), data<R>(weights, functions), batch, functions, num_generations,
           scale_rewards, aggregation, eps, normalized, mutable_data<R>(out));
  };
  type == ScalarType::Double ? typed(double()) : typed(float());
  return out;
}

}  // namespace grpo::cuda

STABLE_TORCH_LIBRARY_IMPL(grpo_kernels, GRPO_DEVICE_KEY, m) {
  m.impl("group_advantages_cuda", TORCH_BOX(&grpo::cuda::group_advantages));
}
