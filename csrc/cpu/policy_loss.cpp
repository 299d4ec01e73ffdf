// policy_loss: loss, gradient by log-probability and metric partials of every token, sequence by sequence.
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
  R log_ratio(int64_t n) const { return logprobs[n] - old_logprob(n); }  // on-policy 0, or a NaN's NaN

  LogRatio<R> averaged(int64_t s, int64_t n) const {
    return averaged_log_ratio(log_ratio(n), fields.advantages.at(fields.sequence_of(s, n), n), options);
  }
};

constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
std::atomic<int64_t*> kept_flags = nullptr;  // of device_values.py

struct SequenceTotals {
  double loss = 0;
  int64_t first_infinite = kNone;
  double partials[kPartialCount] = {};
};

struct Mean {
  double sum = 0;
  int64_t tokens = 0;

  double value() const { return tokens ? sum / static_cast<double>(tokens) : 0; }
};

// Of the log-ratios of a sequence's unmasked tokens.
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

// Whether every token of a sequence is far from the limits: one pass without a branch.
template <class R>
bool all_near(const Inputs<R>& in, int64_t begin, int64_t end, R mean) {
  const R* const logprobs = in.logprobs;
  const R* const old = in.options.level == Level::kToken && in.fields.old_logprobs.values ? in.fields.old_logprobs.values : logprobs;
  const R* const ref = in.fields.ref_logprobs.values ? in.fields.ref_logprobs.values : logprobs;
  int far = is_near(R(0), mean, R(0)) ? 0 : 1;
  for (int64_t n = begin; n < end; ++n) {
    far |= is_near(logprobs[n], logprobs[n] - old[n], logprobs[n] - ref[n]) ? 0 : 1;
  }
  return far == 0;
}

template <bool kAtLimits, class R>
[[gnu::noinline]] SequenceTotals sequence_loss(const Inputs<R>& in, int64_t own, int64_t begin, int64_t end,
                                               const Mean& means, R* dlogprobs) {
  const Level level = in.options.level;
  const R mean = static_cast<R>(means.value());
  const bool is_alone = level == Level::kToken || means.tokens == 1;
  const bool spreads = level == Level::kSequence || level == Level::kGeometric;
  SequenceTotals out;
  double tokens = 0, low = 0, high = 0, dmean = 0;
  for (int64_t n = begin; n < end; ++n) {
    dlogprobs[n] = 0;
    if (!in.fields.mask[n]) continue;
    const int64_t s = in.fields.sequence_of(own, n);
    const R log_ratio = level == Level::kToken ? in.log_ratio(n) : mean;
    const TokenLoss<R> token =
        token_loss<kAtLimits>(in.logprobs[n], log_ratio, is_alone, in.old_logprob(n), in.fields.ref_logprob(n),
                              in.fields.advantages.at(s, n), in.fields.policy_weight(s, n), in.fields.weights.at(s, n),
                              in.options);
    if (kAtLimits && std::isinf(token.loss)) out.first_infinite = std::min(out.first_infinite, n);
    dlogprobs[n] = token.dlogprob + (spreads ? R(0) : token.dlog_ratio);
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
  if (spreads && tokens > 0) {  // the mean hands its derivative to its tokens in equal parts
    for (int64_t n = begin; n < end; ++n) {
      if (in.fields.mask[n] && in.averaged(own, n).passes) dlogprobs[n] += static_cast<R>(dmean / tokens);
    }
  }
  const bool counts_sequences = level == Level::kSequence;
  const double share = tokens > 0 ? tokens : 1;
  out.partials[kTokens] = tokens;
  out.partials[kRatios] = counts_sequences ? 1 : tokens;
  out.partials[kLow] = counts_sequences ? low / share : low;
  out.partials[kHigh] = counts_sequences ? high / share : high;
  const bool has_share = counts_sequences || tokens > 0;
  out.partials[kLowMin] = has_share ? low / share : INFINITY;
  out.partials[kHighMax] = has_share ? high / share : -INFINITY;
  return out;
}

template <class R>
SequenceTotals sequence_loss(const Inputs<R>& in, int64_t s, int64_t begin, int64_t end, R* dlogprobs) {
  const Mean means = in.options.level == Level::kToken ? Mean() : mean_log_ratio(in, s, begin, end);
  return all_near(in, begin, end, static_cast<R>(means.value()))
             ? sequence_loss<false>(in, s, begin, end, means, dlogprobs)
             : sequence_loss<true>(in, s, begin, end, means, dlogprobs);
}

// In the sequences' order, whatever thread computed them.
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

// The least index of a token without a bound, beside those of earlier calls.
void keep_infinite(const std::vector<SequenceTotals>& sequences) {
  int64_t* const flags = kept_flags.load(std::memory_order_acquire);
  if (flags == nullptr) return;
  int64_t least = kNone;
  for (const SequenceTotals& s : sequences) least = std::min(least, s.first_infinite);
  if (least == kNone) return;
  const std::atomic_ref<int64_t> kept(flags[kBadLoss]);
  for (int64_t known = kept.load(); least < known && !kept.compare_exchange_weak(known, least);) continue;
}

}  // namespace

void keep_first_bad(const Tensor& first_bad) {
  kept_flags.store(mutable_data<int64_t>(first_bad), std::memory_order_release);
}

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
  const auto run = [&]<class R>(R) {
    const int64_t tokens = logprobs.numel(), length = sequences > 0 ? tokens / sequences : 0;
    const TokenTensors tensors{mask, sequence_ids, advantages, weights, policy_factors, entropy_weights, old_logprobs,
                               ref_logprobs};
    const int64_t known = tensors.sequences(sequences);
    const Inputs<R> in{data<R>(logprobs, tokens), data<R>(entropy, tokens), token_fields<R>(tensors, known, tokens),
                       PolicyOptions<R>::decode(options, params)};
    check_sequence_ids(in.fields.sequence_ids, tokens, known);
    const int64_t* offset = data<int64_t>(offsets, sequences + 1);
    if (offset) check_offsets(offset, sequences, tokens);
    else STD_TORCH_CHECK(sequences >= 0 && length * sequences == tokens, "expected sequences of the same length");
    std::vector<SequenceTotals> totals(sequences);
    parallel_rows(sequences, 32 * length, [&](int64_t s) {
      const int64_t begin = offset ? offset[s] : s * length, end = offset ? offset[s + 1] : begin + length;
      totals[s] = sequence_loss<R>(in, s, begin, end, mutable_data<R>(dlogprobs));
    });
    if (keeps_infinite) keep_infinite(totals);
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
