// policy_loss: the loss, its gradient by the log-probabilities, and the metric partials. One block per sequence; then
// one block per total adds the sequences in order.
#include "policy_math.h"

#include <cmath>
#include <tuple>
#include <vector>

#include "row.cuh"
#include "token_fields.h"

namespace grpo::cuda {
namespace {

constexpr int kLossTotal = kPartialCount;  // the loss is stored after the partials
constexpr int kTotalCount = kPartialCount + 1;

template <class R>
struct Policy {
  const R *logprobs, *entropy;
  TokenFields<R> fields;
  const int64_t* offsets;  // null: all sequences have the same length
  PolicyOptions<R> options;
  R* dlogprobs;
  double* totals;  // [kTotalCount, sequences]
  int64_t tokens, sequences;
  int64_t* first_bad;  // or null

  __device__ __forceinline__ R old_logprob(int64_t n) const { return fields.old_logprob(n, logprobs[n]); }
  __device__ __forceinline__ R log_ratio(int64_t n) const {  // on-policy: 0, or NaN
    return logprobs[n] - old_logprob(n);
  }
  __device__ __forceinline__ LogRatio<R> averaged(int64_t s, int64_t n) const {
    return averaged_log_ratio(log_ratio(n), fields.advantages.at(fields.sequence_of(s, n), n), options);
  }
};

struct Mean {
  double sum = 0, count = 0;

  __device__ __forceinline__ void merge(const Mean& other) {
    sum += other.sum;
    count += other.count;
  }
  __device__ __forceinline__ double value() const { return count > 0 ? sum / count : 0; }
};

struct SequenceSums {
  double loss = 0, tokens = 0, kl = 0, entropy = 0, low = 0, high = 0, dmean = 0;

  __device__ __forceinline__ void merge(const SequenceSums& other) {
    loss += other.loss;
    tokens += other.tokens;
    kl += other.kl;
    entropy += other.entropy;
    low += other.low;
    high += other.high;
    dmean += other.dmean;
  }
};

struct PolicyShared {
  Mean mean;
  double dmean;
  Mean means[kThreads / kWarp];
  SequenceSums sums[kThreads / kWarp];
};

// Mean log-ratio of a sequence's unmasked tokens; every thread gets it.
template <class R>
__device__ Mean mean_log_ratio(const Policy<R>& policy, int64_t s, int64_t begin, int64_t end, PolicyShared& shared) {
  Mean mean;
  for (int64_t n = begin + threadIdx.x; n < end; n += kThreads) {
    if (policy.fields.mask[n]) mean.merge({static_cast<double>(policy.averaged(s, n).value), 1});
  }
  mean = reduce_block(mean, shared.means, Merge());
  if (threadIdx.x == 0) shared.mean = mean;
  __syncthreads();
  return shared.mean;
}

// Adds a token to the sums, and writes its gradient.
template <class R>
__device__ void add_token(const Policy<R>& policy, int64_t sequence, int64_t n, R mean, bool is_single_token,
                          bool has_mean_gradient, SequenceSums& sums) {
  const TokenFields<R>& fields = policy.fields;
  const int64_t s = fields.sequence_of(sequence, n);
  const R log_ratio = policy.options.level == Level::kToken ? policy.log_ratio(n) : mean;
  const TokenLoss<R> token =
      token_loss(policy.logprobs[n], log_ratio, is_single_token, policy.old_logprob(n), fields.ref_logprob(n),
                 fields.advantages.at(s, n), fields.policy_weight(s, n), fields.weights.at(s, n), policy.options);
  policy.dlogprobs[n] = token.dlogprob + (has_mean_gradient ? R(0) : token.dlog_ratio);
  sums.dmean += token.dlog_ratio;
  sums.loss += token.loss;
  if (policy.first_bad != nullptr && std::isinf(token.loss)) flag(policy.first_bad, kBadLoss, n);
  sums.tokens += 1;
  sums.kl += token.kl;
  sums.low += token.is_low;
  sums.high += token.is_high;
  if (policy.entropy == nullptr) return;
  sums.entropy += policy.entropy[n];
  if (fields.entropy_weights.values) {
    sums.loss -= static_cast<double>(fields.entropy_weights.at(s, n)) * policy.entropy[n];
  }
}

template <class R>
__device__ void write_totals(const Policy<R>& policy, int64_t s, const SequenceSums& sums) {
  const bool is_sequence_level = policy.options.level == Level::kSequence;
  const double divisor = sums.tokens > 0 ? sums.tokens : 1;
  const bool has_ratio = is_sequence_level || sums.tokens > 0;
  const auto write = [&](int which, double value) { policy.totals[which * policy.sequences + s] = value; };
  write(kTokens, sums.tokens);
  write(kRatios, is_sequence_level ? 1 : sums.tokens);
  write(kKl, sums.kl);
  write(kEntropy, sums.entropy);
  write(kLow, is_sequence_level ? sums.low / divisor : sums.low);
  write(kHigh, is_sequence_level ? sums.high / divisor : sums.high);
  write(kLowMin, has_ratio ? sums.low / divisor : static_cast<double>(INFINITY));
  write(kHighMax, has_ratio ? sums.high / divisor : -static_cast<double>(INFINITY));
  write(kLossTotal, sums.loss);
}

template <class R>
__global__ void __launch_bounds__(kThreads, sizeof(R) == 8 ? 1 : 2)
loss_of_sequences(const __grid_constant__ Policy<R> policy) {
  auto& shared = *static_cast<PolicyShared*>(dynamic_shared());
  const int64_t s = blockIdx.x;
  // a GPU does not check the offsets, so they are clamped to keep reads in bounds
  const int64_t length = policy.tokens / policy.sequences;
  const int64_t first = policy.offsets ? policy.offsets[s] : s * length;
  const int64_t last = policy.offsets ? policy.offsets[s + 1] : first + length;
  const int64_t begin = first > 0 ? first : 0, end = last < policy.tokens ? last : policy.tokens;
  const Level level = policy.options.level;
  const Mean log_ratios = level == Level::kToken ? Mean() : mean_log_ratio(policy, s, begin, end, shared);
  const R mean = static_cast<R>(log_ratios.value());
  const bool is_single_token = level == Level::kToken || log_ratios.count == 1;
  const bool has_mean_gradient = level == Level::kSequence || level == Level::kGeometric;
  SequenceSums sums;
  for (int64_t n = begin + threadIdx.x; n < end; n += kThreads) {
    if (policy.fields.mask[n]) add_token(policy, s, n, mean, is_single_token, has_mean_gradient, sums);
    else policy.dlogprobs[n] = 0;
  }
  sums = reduce_block(sums, shared.sums, Merge());
  if (threadIdx.x == 0) {
    write_totals(policy, s, sums);
    shared.dmean = sums.tokens > 0 ? sums.dmean / sums.tokens : 0;
  }
  if (!has_mean_gradient) return;
  __syncthreads();
  // d mean / d log-ratio is 1 / tokens for every token
  const R dlog_ratio = static_cast<R>(shared.dmean);
  for (int64_t n = begin + threadIdx.x; n < end; n += kThreads) {
    if (policy.fields.mask[n] && policy.averaged(s, n).has_gradient) policy.dlogprobs[n] += dlog_ratio;
  }
}

struct Total {
  double value;
  int which;
  int padding = 0;  // shuffle_xor copies whole words, so all bytes must be initialised

  __device__ __forceinline__ explicit Total(int which = 0)
      : value(which == kLowMin    ? static_cast<double>(INFINITY)
              : which == kHighMax ? -static_cast<double>(INFINITY)
                                  : 0),
        which(which) {}

  __device__ __forceinline__ void merge(const Total& other) {
    if (which == kLowMin) value = fmin(value, other.value);
    else if (which == kHighMax) value = fmax(value, other.value);
    else value += other.value;
  }
};

template <class R>
__global__ void __launch_bounds__(kThreads)
add_sequences(const double* totals, int64_t sequences, R* loss, R* partials) {
  auto* const parts = static_cast<Total*>(dynamic_shared());
  const int which = static_cast<int>(blockIdx.x);
  Total total(which);
  for (int64_t s = threadIdx.x; s < sequences; s += kThreads) {
    Total sequence(which);
    sequence.value = totals[which * sequences + s];
    total.merge(sequence);
  }
  total = reduce_block(total, parts, Merge());
  if (threadIdx.x == 0) (which == kLossTotal ? loss : partials + which)[0] = static_cast<R>(total.value);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> policy_loss_fwd(
    const Tensor& logprobs,                // [N]
    const std::optional<Tensor>& entropy,  // [N]
    const Tensor& mask, const std::optional<Tensor>& sequence_ids, const std::optional<Tensor>& advantages,
    const Tensor& weights, const std::optional<Tensor>& policy_factors, const std::optional<Tensor>& entropy_weights,
    const std::optional<Tensor>& old_logprobs, const std::optional<Tensor>& ref_logprobs,
    const std::optional<Tensor>& offsets,  // [sequences + 1]; absent: all sequences have the same length
    int64_t sequences, std::vector<int64_t> options, std::vector<double> params, bool flags_infinite) {
  STD_TORCH_CHECK(advantages.has_value(), "expected advantages");
  const ScalarType type = arithmetic_type(logprobs);
  const Tensor loss = empty({}, type, logprobs), dlogprobs = empty_like(logprobs, type);
  const Tensor partials = empty({kPartialCount}, type, logprobs);
  const int64_t tokens = logprobs.numel();
  STD_TORCH_CHECK(sequences >= 0, "expected a number of sequences");
  STD_TORCH_CHECK(offsets || tokens == 0 || (sequences > 0 && tokens % sequences == 0),
                  "expected sequences of the same length");
  const TokenTensors tensors{mask, sequence_ids, advantages, weights, policy_factors, entropy_weights, old_logprobs,
                             ref_logprobs};
  const Tensor totals = empty({kTotalCount * sequences}, ScalarType::Double, logprobs);
  const Device device(logprobs);
  const auto run = [&]<class R>(R) {
    const Policy<R> policy{data<R>(logprobs, tokens),
                           data<R>(entropy, tokens),
                           token_fields<R>(tensors, tensors.sequence_count(sequences), tokens),
                           data<int64_t>(offsets, sequences + 1),
                           PolicyOptions<R>::decode(options, params),
                           mutable_data<R>(dlogprobs),
                           mutable_data<double>(totals),
                           tokens,
                           sequences,
                           flags_infinite ? device.first_bad() : nullptr};
    launch(device, "policy_loss", {sequences, tokens}, {sequences, kThreads, sizeof(PolicyShared)},
           loss_of_sequences<R>, policy);
    launch(device, "policy_loss' totals", {sequences}, {kTotalCount, kThreads, kThreads / kWarp * int{sizeof(Total)}},
           add_sequences<R>, mutable_data<double>(totals), sequences, mutable_data<R>(loss), mutable_data<R>(partials));
  };
  type == ScalarType::Double ? run(double()) : run(float());
  return {loss, dlogprobs, partials};
}

}  // namespace grpo::cuda

STABLE_TORCH_LIBRARY_IMPL(grpo_kernels, GRPO_DEVICE_KEY, m) {
  m.impl("policy_loss_fwd_cuda", TORCH_BOX(&grpo::cuda::policy_loss_fwd));
}
