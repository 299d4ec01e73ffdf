// policy_loss: the loss, its gradient by the log-probabilities, and the metric partials, sequence by sequence.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "bad_values.h"
#include "parallel.h"
#include "policy_math.h"
#include "token_fields.h"

namespace grpo {
namespace {

template <class R>
struct Inputs {
  const R *logprobs, *entropy;
  TokenFields<R> fields;
  PolicyOptions<R> options;

  R old_logprob(int64_t n) const { return fields.old_logprob(n, logprobs[n]); }
  R log_ratio(int64_t n) const { return logprobs[n] - old_logprob(n); }  // on-policy: 0, or NaN

  LogRatio<R> averaged(int64_t s, int64_t n) const {
    return averaged_log_ratio(log_ratio(n), fields.advantages.at(fields.sequence_of(s, n), n), options);
  }
};

constexpr int64_t kNoIndex = std::numeric_limits<int64_t>::max();
std::atomic<int64_t*> registered_flags = nullptr;  // set by cpu_keep_first_bad; see device_values.py

struct SequenceTotals {
  double loss = 0;
  int64_t first_infinite = kNoIndex;
  double partials[kPartialCount] = {};
};

struct Mean {
  double sum = 0;
  int64_t tokens = 0;

  double value() const { return tokens ? sum / static_cast<double>(tokens) : 0; }
};

// Mean log-ratio of a sequence's unmasked tokens.
template <class R>
Mean mean_log_ratio(const Inputs<R>& in, int64_t s, int64_t begin, int64_t end) {
  Mean mean;
  for (int64_t n = begin; n < end; ++n) {
    if (!in.fields.mask[n]) continue;
    mean.sum += in.averaged(s, n).value;
    ++mean.tokens;
  }
  return mean;
}

// Whether every token of a sequence is far from the limits. Branch-free, so that it is vectorised.
template <class R>
bool all_near(const Inputs<R>& in, int64_t begin, int64_t end, R mean) {
  const R* const logprobs = in.logprobs;
  const bool has_own_ratios = in.options.level == Level::kToken && in.fields.old_logprobs.values;
  const R* const old = has_own_ratios ? in.fields.old_logprobs.values : logprobs;
  const R* const ref = in.fields.ref_logprobs.values ? in.fields.ref_logprobs.values : logprobs;
  int far = is_near(R(0), mean, R(0)) ? 0 : 1;
  for (int64_t n = begin; n < end; ++n) {
    far |= is_near(logprobs[n], logprobs[n] - old[n], logprobs[n] - ref[n]) ? 0 : 1;
  }
  return far == 0;
}

template <bool kAtLimits, class R>
[[gnu::noinline]] SequenceTotals sequence_loss(const Inputs<R>& in, int64_t sequence, int64_t begin, int64_t end,
                                               const Mean& log_ratios, R* dlogprobs) {
  const Level level = in.options.level;
  const R mean = static_cast<R>(log_ratios.value());
  const bool is_single_token = level == Level::kToken || log_ratios.tokens == 1;
  const bool has_mean_gradient = level == Level::kSequence || level == Level::kGeometric;
  SequenceTotals out;
  double tokens = 0, low = 0, high = 0, dmean = 0;
  for (int64_t n = begin; n < end; ++n) {
    dlogprobs[n] = 0;
    if (!in.fields.mask[n]) continue;
    const int64_t s = in.fields.sequence_of(sequence, n);
    const R log_ratio = level == Level::kToken ? in.log_ratio(n) : mean;
    const TokenLoss<R> token =
        token_loss<kAtLimits>(in.logprobs[n], log_ratio, is_single_token, in.old_logprob(n), in.fields.ref_logprob(n),
                              in.fields.advantages.at(s, n), in.fields.policy_weight(s, n), in.fields.weights.at(s, n),
                              in.options);
    if (kAtLimits && std::isinf(token.loss)) out.first_infinite = std::min(out.first_infinite, n);
    dlogprobs[n] = token.dlogprob + (has_mean_gradient ? R(0) : token.dlog_ratio);
    dmean += token.dlog_ratio;
    out.loss += token.loss;
    if (in.entropy && in.fields.entropy_weights.values) {
      out.loss -= static_cast<double>(in.fields.entropy_weights.at(s, n)) * in.entropy[n];
    }
    tokens += 1;
    low += token.is_low;
    high += token.is_high;
    out.partials[kKl] += token.kl;
    if (in.entropy) out.partials[kEntropy] += in.entropy[n];
  }
  if (has_mean_gradient && tokens > 0) {  // d mean / d log-ratio is 1 / tokens for every token
    for (int64_t n = begin; n < end; ++n) {
      if (in.fields.mask[n] && in.averaged(sequence, n).has_gradient) dlogprobs[n] += static_cast<R>(dmean / tokens);
    }
  }
  const bool is_sequence_level = level == Level::kSequence;
  const double divisor = tokens > 0 ? tokens : 1;
  out.partials[kTokens] = tokens;
  out.partials[kRatios] = is_sequence_level ? 1 : tokens;
  out.partials[kLow] = is_sequence_level ? low / divisor : low;
  out.partials[kHigh] = is_sequence_level ? high / divisor : high;
  const bool has_ratio = is_sequence_level || tokens > 0;
  out.partials[kLowMin] = has_ratio ? low / divisor : INFINITY;
  out.partials[kHighMax] = has_ratio ? high / divisor : -INFINITY;
  return out;
}

template <class R>
SequenceTotals sequence_loss(const Inputs<R>& in, int64_t s, int64_t begin, int64_t end, R* dlogprobs) {
  const Mean log_ratios = in.options.level == Level::kToken ? Mean() : mean_log_ratio(in, s, begin, end);
  return all_near(in, begin, end, static_cast<R>(log_ratios.value()))
             ? sequence_loss<false>(in, s, begin, end, log_ratios, dlogprobs)
             : sequence_loss<true>(in, s, begin, end, log_ratios, dlogprobs);
}

// Adds the sequences in order, so that the result does not depend on the threads.
template <class R>
void reduce(const std::vector<SequenceTotals>& sequences, R* loss, R* partials) {
  SequenceTotals sum;
  sum.partials[kLowMin] = INFINITY;
  sum.partials[kHighMax] = -INFINITY;
  for (const SequenceTotals& s : sequences) {
    sum.loss += s.loss;
    for (int i = 0; i < kLowMin; ++i) sum.partials[i] += s.partials[i];
    sum.partials[kLowMin] = std::fmin(sum.partials[kLowMin], s.partials[kLowMin]);
    sum.partials[kHighMax] = std::fmax(sum.partials[kHighMax], s.partials[kHighMax]);
  }
  *loss = static_cast<R>(sum.loss);
  for (int i = 0; i < kPartialCount; ++i) partials[i] = static_cast<R>(sum.partials[i]);
}

// Flags the first token with an infinite loss, unless an earlier call flagged a smaller index.
void flag_infinite(const std::vector<SequenceTotals>& sequences) {
  int64_t* const flags = registered_flags.load(std::memory_order_acquire);
  if (flags == nullptr) return;
  int64_t first = kNoIndex;
  for (const SequenceTotals& s : sequences) first = std::min(first, s.first_infinite);
  if (first == kNoIndex) return;
  const std::atomic_ref<int64_t> flag(flags[kBadLoss]);
  for (int64_t previous = flag.load(); first < previous && !flag.compare_exchange_weak(previous, first);) continue;
}

}  // namespace

void keep_first_bad(const Tensor& first_bad) {
  registered_flags.store(mutable_data<int64_t>(first_bad), std::memory_order_release);
}

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
  const auto run = [&]<class R>(R) {
    const int64_t tokens = logprobs.numel(), length = sequences > 0 ? tokens / sequences : 0;
    const TokenTensors tensors{mask, sequence_ids, advantages, weights, policy_factors, entropy_weights, old_logprobs,
                               ref_logprobs};
    const int64_t id_count = tensors.sequence_count(sequences);
    const Inputs<R> in{data<R>(logprobs, tokens), data<R>(entropy, tokens), token_fields<R>(tensors, id_count, tokens),
                       PolicyOptions<R>::decode(options, params)};
    check_sequence_ids(in.fields.sequence_ids, tokens, id_count);
    const int64_t* offset = data<int64_t>(offsets, sequences + 1);
    if (offset) check_offsets(offset, sequences, tokens);
    else STD_TORCH_CHECK(sequences >= 0 && length * sequences == tokens, "expected sequences of the same length");
    std::vector<SequenceTotals> totals(sequences);
    parallel_rows(sequences, 32 * length, [&](int64_t s) {
      const int64_t begin = offset ? offset[s] : s * length, end = offset ? offset[s + 1] : begin + length;
      totals[s] = sequence_loss<R>(in, s, begin, end, mutable_data<R>(dlogprobs));
    });
    if (flags_infinite) flag_infinite(totals);
    reduce<R>(totals, mutable_data<R>(loss), mutable_data<R>(partials));
  };
  type == ScalarType::Double ? run(double()) : run(float());
  return {loss, dlogprobs, partials};
}

}  // namespace grpo

STABLE_TORCH_LIBRARY_FRAGMENT(grpo_kernels, m) { m.def("cpu_keep_first_bad(Tensor first_bad) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(grpo_kernels, CPU, m) {
  m.impl("policy_loss_fwd_cpu", TORCH_BOX(&grpo::policy_loss_fwd));
  m.impl("cpu_keep_first_bad", TORCH_BOX(&grpo::keep_first_bad));
}
