// policy_loss: loss, gradient by log-probability and metric partials of every token. A block takes a sequence; then one
// block a total adds the sequences in order.
#include "policy_math.h"

#include <cmath>
#include <tuple>
#include <vector>

#include "row.cuh"
#include "token_fields.h"

namespace grpo::cuda {
namespace {

constexpr int kLossTotal = kPartialCount;  // the loss stands after the partials
constexpr int kTotalCount = kPartialCount + 1;

template <class R>
struct Policy {
  const R *logprobs, *entropy;
  TokenFields<R> fields;
  const int64_t* offsets;  // or null: each sequence has as many tokens
  PolicyOptions<R> options;
  R* dlogprobs;
  double* totals;  // [kTotalCount, sequences]
  int64_t tokens, sequences;
  int64_t* first_bad;  // or null

  __device__ __forceinline__ R old_logprob(int64_t n) const { return fields.old_logprob(n, logprobs[n]); }
  __device__ __forceinline__ R log_ratio(int64_t n) const {  // on-policy 0, or a NaN's NaN
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

// Of the log-ratios of a sequence's unmasked tokens, for every thread.
template <class R>
__device__ Mean mean_log_ratio(const Policy<R>& policy, int64_t s, int64_t begin, int64_t end, PolicyShared& shared) {
  Mean own;
  for (int64_t n = begin + threadIdx.x; n < end; n += kThreads) {
    if (policy.fields.mask[n]) own.merge({static_cast<double>(policy.averaged(s, n).value), 1});
  }
  const Mean all = over_block(own, shared.means, Merge());
  if (threadIdx.x == 0) shared.mean = all;
  __syncthreads();
  return shared.mean;
}

// One token's part of the sums; its gradient is written.
template <class R>
__device__ void add_token(const Policy<R>& policy, int64_t own, int64_t n, R mean, bool is_alone, bool spreads,
                          SequenceSums& sums) {
  const TokenFields<R>& fields = policy.fields;
  const int64_t s = fields.sequence_of(own, n);
  const R log_ratio = policy.options.level == Level::kToken ? policy.log_ratio(n) : mean;
  const TokenLoss<R> token =
      token_loss(policy.logprobs[n], log_ratio, is_alone, policy.old_logprob(n), fields.ref_logprob(n),
                 fields.advantages.at(s, n), fields.policy_weight(s, n), fields.weights.at(s, n), policy.options);
  policy.dlogprobs[n] = token.dlogprob + (spreads ? R(0) : token.dlog_ratio);
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
  const bool counts_sequences = policy.options.level == Level::kSequence;
  const double share = sums.tokens > 0 ? sums.tokens : 1;
  const bool has_share = counts_sequences || sums.tokens > 0;
  const auto write = [&](int which, double value) { policy.totals[which * policy.sequences + s] = value; };
  write(kTokens, sums.tokens);
  write(kRatios, counts_sequences ? 1 : sums.tokens);
  write(kKl, sums.kl);
  write(kEntropy, sums.entropy);
  write(kLow, counts_sequences ? sums.low / share : sums.low);
  write(kHigh, counts_sequences ? sums.high / share : sums.high);
  write(kLowMin, has_share ? sums.low / share : static_cast<double>(INFINITY));
  write(kHighMax, has_share ? sums.high / share : -static_cast<double>(INFINITY));
  write(kLossTotal, sums.loss);
}

template <class R>
__global__ void __launch_bounds__(kThreads, sizeof(R) == 8 ? 1 : 2)
loss_of_sequences(const __grid_constant__ Policy<R> policy) {
  auto& shared = *static_cast<PolicyShared*>(dynamic_shared());
  const int64_t s = blockIdx.x;
  // values are not checked on a GPU; reads stay inside
  const int64_t length = policy.tokens / policy.sequences;
  const int64_t first = policy.offsets ? policy.offsets[s] : s * length;
  const int64_t past = policy.offsets ? policy.offsets[s + 1] : first + length;
  const int64_t begin = first > 0 ? first : 0, end = past < policy.tokens ? past : policy.tokens;
  const Level level = policy.options.level;
  const Mean means = level == Level::kToken ? Mean() : mean_log_ratio(policy, s, begin, end, shared);
  const R mean = static_cast<R>(means.value());
  const bool is_alone = level == Level::kToken || means.count == 1;
  const bool spreads = level == Level::kSequence || level == Level::kGeometric;
  SequenceSums sums;
  for (int64_t n = begin + threadIdx.x; n < end; n += kThreads) {
    if (policy.fields.mask[n]) add_token(policy, s, n, mean, is_alone, spreads, sums);
    else policy.dlogprobs[n] = 0;
  }
  sums = over_block(sums, shared.sums, Merge());
  if (threadIdx.x == 0) {
    write_totals(policy, s, sums);
    shared.dmean = sums.tokens > 0 ? sums.dmean / sums.tokens : 0;
  }
  if (!spreads) return;
  __syncthreads();
  // the mean hands its derivative to its tokens in equal parts
  const R part = static_cast<R>(shared.dmean);
  for (int64_t n = begin + threadIdx.x; n < end; n += kThreads) {
    if (policy.fields.mask[n] && policy.averaged(s, n).passes) policy.dlogprobs[n] += part;
  }
}

struct Total {
  double value;
  int which;
  int unused = 0;  // words are exchanged

  __device__ __forceinline__ explicit Total(int which = 0)
      : value(which == kLowMin ? static_cast<double>(INFINITY) : which == kHighMax ? -static_cast<double>(INFINITY) : 0),
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
  Total own(which);
  for (int64_t s = threadIdx.x; s < sequences; s += kThreads) {
    Total one(which);
    one.value = totals[which * sequences + s];
    own.merge(one);
  }
  own = over_block(own, parts, Merge());
  if (threadIdx.x == 0) (which == kLossTotal ? loss : partials + which)[0] = static_cast<R>(own.value);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> policy_loss_fwd(
    const Tensor& logprobs,                // [N]
    const std::optional<Tensor>& entropy,  // [N]
    const Tensor& mask, const std::optional<Tensor>& sequence_ids, const std::optional<Tensor>& advantages,
    const Tensor& weights, const std::optional<Tensor>& policy_factors, const std::optional<Tensor>& entropy_weights,
    const std::optional<Tensor>& old_logprobs, const std::optional<Tensor>& ref_logprobs,
    const std::optional<Tensor>& offsets,  // [sequences + 1]; else each has as many tokens
    int64_t sequences, std::vector<int64_t> options, std::vector<double> params, bool keeps_infinite) {
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
  const Place place(logprobs);
  const auto run = [&]<class R>(R) {
    const Policy<R> policy{data<R>(logprobs, tokens),
                           data<R>(entropy, tokens),
                           token_fields<R>(tensors, tensors.sequences(sequences), tokens),
                           data<int64_t>(offsets, sequences + 1),
                           PolicyOptions<R>::decode(options, params),
                           mutable_data<R>(dlogprobs),
                           mutable_data<double>(totals),
                           tokens,
                           sequences,
                           keeps_infinite ? place.first_bad() : nullptr};
    launch(place, "policy_loss", {sequences, tokens}, {sequences, kThreads, sizeof(PolicyShared)},
           loss_of_sequences<R>, policy);
    launch(place, "policy_loss' totals", {sequences}, {kTotalCount, kThreads, kThreads / kWarp * int{sizeof(Total)}},
           add_sequences<R>, mutable_data<double>(totals), sequences, mutable_data<R>(loss), mutable_data<R>(partials));
  };
  type == ScalarType::Double ? run(double()) : run(float());
  return {loss, dlogprobs, partials};
}

}  // namespace grpo::cuda

STABLE_TORCH_LIBRARY_IMPL(grpo_kernels, GRPO_DEVICE_KEY, m) {
  m.impl("policy_loss_fwd_cuda", TORCH_BOX(&grpo::cuda::policy_loss_fwd));
}
