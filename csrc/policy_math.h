// The per-token maths of the GRPO family, for host and device: ratio, clip, KL, and their derivatives.
//
// The only C++ copy. A new surrogate or KL estimator is a branch here, its constants, and the same in
// ops/policy_loss/reference.py. Enumerations mirror grpo_kernels/config.py and ops/policy_loss/metrics.py.
#pragma once

#include <cmath>
#include <cstdint>
#include <stdexcept>

#ifdef __CUDACC__
#define GRPO_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define GRPO_HOST_DEVICE inline
#endif

namespace grpo {

enum class Surrogate : int64_t { kClip = 0 };
enum Option { kSurrogate, kSequenceLevel, kKlEstimator, kBiasCorrectedKl, kOptionCount };
enum Param { kRatioLow, kRatioHigh, kDelta, kBeta, kParamCount };
enum Partial { kTokens, kRatios, kKl, kEntropy, kLow, kHigh, kLowMin, kHighMax, kPartialCount };

template <class R>
struct PolicyOptions {
  Surrogate surrogate;
  bool sequence_level;
  bool bias_corrected_kl;
  R ratio_low;
  R ratio_high;
  R delta;  // infinity when absent
  R beta;

  // From arrays that can be indexed; host only.
  template <class Options, class Params>
  static PolicyOptions decode(const Options& options, const Params& params) {
    if (options.size() != kOptionCount || params.size() != kParamCount) {
      throw std::invalid_argument("the loss's options are not those of this build");
    }
    return {static_cast<Surrogate>(options[kSurrogate]), options[kSequenceLevel] != 0,
            options[kBiasCorrectedKl] != 0,              static_cast<R>(params[kRatioLow]),
            static_cast<R>(params[kRatioHigh]),          static_cast<R>(params[kDelta]),
            static_cast<R>(params[kBeta])};
  }
};

// A function of a token's log-ratio and of its log-probability, with both derivatives.
template <class R>
struct Term {
  R value;
  R dlog_ratio;
  R dlogprob;
};

template <class R>
GRPO_HOST_DEVICE R clamp(R x, R low, R high) {
  return x < low ? low : (x > high ? high : x);
}

// min(min(r, delta) A, clip(r) A). On a bound, and where both terms are equal, the derivative is autograd's: a clamp
// passes it on its bounds, and a minimum of equal terms passes half to each.
template <class R>
GRPO_HOST_DEVICE Term<R> clip_surrogate(R ratio, R advantage, const PolicyOptions<R>& o) {
  const R unclipped = (ratio > o.delta ? o.delta : ratio) * advantage;
  const R clipped = clamp(ratio, o.ratio_low, o.ratio_high) * advantage;
  const R d_unclipped = ratio > o.delta ? R(0) : ratio * advantage;  // NaN passes
  const R d_clipped = ratio < o.ratio_low || ratio > o.ratio_high ? R(0) : ratio * advantage;
  if (unclipped < clipped) return {unclipped, d_unclipped, R(0)};
  if (clipped < unclipped) return {clipped, d_clipped, R(0)};
  return {unclipped, R(0.5) * (d_unclipped + d_clipped), R(0)};
}

template <class R>
GRPO_HOST_DEVICE Term<R> surrogate(R ratio, R advantage, const PolicyOptions<R>& o) {
  switch (o.surrogate) {
    case Surrogate::kClip:
      return clip_surrogate(ratio, advantage, o);
  }
  return {R(NAN), R(NAN), R(NAN)};  // an option that this build does not know must not pass for a number
}

// k3 = e^d - d - 1 with d = l_ref - l; bias-corrected, times the ratio.
template <class R>
GRPO_HOST_DEVICE Term<R> kl_penalty(R logprob, R ref_logprob, R ratio, const PolicyOptions<R>& o) {
  const R d = ref_logprob - logprob;
  const R growth = std::expm1(d);
  const R k3 = growth - d;
  if (!o.bias_corrected_kl) return {k3, R(0), -growth};
  return {k3 * ratio, k3 * ratio, -growth * ratio};
}

// What one unmasked token adds to the loss, without the entropy bonus, and to the metrics.
template <class R>
struct TokenLoss {
  R loss;
  R dlog_ratio;
  R dlogprob;  // directly: the part that does not pass through the ratio
  R kl;
  bool is_low;
  bool is_high;
};

template <class R>
GRPO_HOST_DEVICE TokenLoss<R> token_loss(R logprob, R log_ratio, const R* ref_logprob, R advantage, R policy_weight,
                                         R kl_weight, const PolicyOptions<R>& o) {
  const R ratio = std::exp(log_ratio);
  // without an advantage the policy term is 0 whatever the ratio, an infinite one included
  const Term<R> s = advantage == 0 ? Term<R>{R(0), R(0), R(0)} : surrogate(ratio, advantage, o);
  TokenLoss<R> out{-policy_weight * s.value, -policy_weight * s.dlog_ratio, -policy_weight * s.dlogprob, R(0), false,
                   false};
  if (ref_logprob != nullptr) {
    const Term<R> k = kl_penalty(logprob, *ref_logprob, ratio, o);
    const R weight = o.beta * kl_weight;
    out.loss += weight * k.value;
    out.dlog_ratio += weight * k.dlog_ratio;
    out.dlogprob += weight * k.dlogprob;
    out.kl = k.value;
  }
  const R bounded = ratio > o.delta ? o.delta : ratio;  // as TRL counts
  out.is_low = bounded < o.ratio_low && advantage < R(0);
  out.is_high = bounded > o.ratio_high && advantage > R(0);
  return out;
}

}  // namespace grpo
