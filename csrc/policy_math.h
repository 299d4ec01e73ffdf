// The per-token maths of the GRPO family, for host and device: ratio, clip, KL, and their derivatives.
//
// The only C++ copy. A new surrogate or KL estimator needs a branch and its constants here, and the same in
// grpo_kernels/loss/reference.py and grpo_kernels/ops/tokens/triton/policy_math.py. The enumerations mirror options.py
// and metrics.py of grpo_kernels/loss.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>

#ifdef __CUDACC__
#define GRPO_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define GRPO_HOST_DEVICE __attribute__((always_inline)) inline
#endif

namespace grpo {

enum class Surrogate : int64_t { kClip, kCispo, kSapo, kLogprob };
enum class Level : int64_t { kToken, kSequence, kSequenceToken, kGeometric };
enum class KlEstimator : int64_t { kK1, kK2, kK3, kAbs };
enum class KlGradient : int64_t { kNaive, kStraightThrough, kImportanceWeighted };
enum Option { kSurrogate, kLevel, kKlEstimator, kKlGradient, kBiasCorrectedKl, kOptionCount };
enum Param {
  kRatioLow,
  kRatioHigh,
  kDelta,
  kBeta,
  kTemperaturePos,
  kTemperatureNeg,
  kLogRatioClamp,
  kKlClamp,
  kParamCount
};
enum Partial { kTokens, kRatios, kKl, kEntropy, kLow, kHigh, kLowMin, kHighMax, kPartialCount };

template <class R>
struct PolicyOptions {
  Surrogate surrogate;
  Level level;
  KlEstimator kl_estimator;
  KlGradient kl_gradient;
  bool bias_corrected_kl;
  R ratio_low, ratio_high;
  R delta;  // infinity when absent, like the clamps
  R beta;
  R temperature_pos, temperature_neg;
  R log_ratio_clamp, kl_clamp;

  // From any type with size() and []; host only.
  template <class Options, class Params>
  static PolicyOptions decode(const Options& options, const Params& params) {
    if (options.size() != kOptionCount || params.size() != kParamCount) {
      throw std::invalid_argument("the loss's options are not those of this build");
    }
    const auto param = [&](Param which) { return static_cast<R>(params[which]); };
    return {static_cast<Surrogate>(options[kSurrogate]),
            static_cast<Level>(options[kLevel]),
            static_cast<KlEstimator>(options[kKlEstimator]),
            static_cast<KlGradient>(options[kKlGradient]),
            options[kBiasCorrectedKl] != 0,
            param(kRatioLow),
            param(kRatioHigh),
            param(kDelta),
            param(kBeta),
            param(kTemperaturePos),
            param(kTemperatureNeg),
            param(kLogRatioClamp),
            param(kKlClamp)};
  }
};

// A number past its limit counts as infinite and is replaced by the limit. So 0 times a ratio is 0, and no sum has
// inf - inf. If the exact loss of a token is unbounded, its loss is infinite. See "Limits" in loss/reference.py;
// limits.py beside it has the same numbers. kAtLimits = false skips the comparisons; every token must be `is_near`.
template <class R>
struct Limit {
  static constexpr R kLogRatio = sizeof(R) == 4 ? R(80) : R(700);
  static constexpr R kJoint = kLogRatio + R(5);  // of log_ratio - d; larger than the ratio alone can reach
  static constexpr R kDistance = R(1e15);        // between two log-probabilities, or from 0
  static constexpr R kTerm = std::numeric_limits<R>::max() / R(32);
  static constexpr R kNear = R(40);  // of log_ratio and |d|: products of their exponentials reach no limit
};

// Whether a token is far from every limit. `d` is logprob - ref_logprob, or 0 without a reference. True for NaN.
template <class R>
GRPO_HOST_DEVICE bool is_near(R logprob, R log_ratio, R d) {
  return !((log_ratio > Limit<R>::kNear) | (std::fabs(d) > Limit<R>::kNear) | (logprob < -Limit<R>::kDistance));
}

// A function of a token's log-ratio and of its log-probability, with both derivatives.
template <class R>
struct Term {
  R value;
  R dlog_ratio;
  R dlogprob;
  bool is_infinite = false;  // the exact value is unbounded; the numbers here stay finite
};

template <class R>
GRPO_HOST_DEVICE R clamp(R x, R low, R high) {
  return x < low ? low : (x > high ? high : x);
}

// weight * logprob, for surrogates that are linear in the log-probability.
template <bool kAtLimits, class R>
GRPO_HOST_DEVICE Term<R> weighted_logprob(R weight, R logprob) {
  if constexpr (!kAtLimits) return {weight * logprob, R(0), weight};
  const bool is_below_limit = logprob < -Limit<R>::kDistance;
  return {weight * (is_below_limit ? -Limit<R>::kDistance : logprob), R(0), weight, is_below_limit && weight != 0};
}

// min(min(r, delta) A, clip(r) A). On a bound and at a tie the derivative is autograd's: a clamp passes the gradient on
// its bounds, and a minimum of equal terms passes half to each.
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

// CISPO: clip(r) A l, with the weight clip(r) A detached.
template <bool kAtLimits, class R>
GRPO_HOST_DEVICE Term<R> cispo_surrogate(R ratio, R logprob, R advantage, const PolicyOptions<R>& o) {
  const R weight = clamp(ratio, o.ratio_low, o.ratio_high) * advantage;
  return weighted_logprob<kAtLimits>(weight, logprob);
}

// SAPO: 4 / tau sigmoid(tau (r - 1)) A.
template <class R>
GRPO_HOST_DEVICE Term<R> sapo_surrogate(R ratio, R advantage, const PolicyOptions<R>& o) {
  const R tau = advantage > R(0) ? o.temperature_pos : o.temperature_neg;
  const R gate = R(1) / (R(1) + std::exp(-tau * (ratio - R(1))));
  return {gate * R(4) / tau * advantage, R(4) * gate * (R(1) - gate) * ratio * advantage, R(0)};
}

template <bool kAtLimits, class R>
GRPO_HOST_DEVICE Term<R> surrogate(R ratio, R logprob, R advantage, const PolicyOptions<R>& o) {
  if (o.level == Level::kGeometric) return {ratio * advantage, ratio * advantage, R(0)};  // clipped token by token
  switch (o.surrogate) {
    case Surrogate::kClip:
      return clip_surrogate(ratio, advantage, o);
    case Surrogate::kCispo:
      return cispo_surrogate<kAtLimits>(ratio, logprob, advantage, o);
    case Surrogate::kSapo:
      return sapo_surrogate(ratio, advantage, o);
    case Surrogate::kLogprob:
      return weighted_logprob<kAtLimits>(advantage, logprob);
  }
  return {R(NAN), R(NAN), R(NAN)};  // an unknown option must not look like a valid loss
}

// A token's log-ratio as it enters its sequence's mean, and whether the token gets a gradient from it. GMPO clips the
// log-ratio on the side that the advantage rewards; a clipped one has no gradient.
template <class R>
struct LogRatio {
  R value;
  bool has_gradient;
};

template <class R>
GRPO_HOST_DEVICE LogRatio<R> averaged_log_ratio(R log_ratio, R advantage, const PolicyOptions<R>& o) {
  if (o.level != Level::kGeometric) return {log_ratio, true};
  const R bound = std::log(advantage > R(0) ? o.ratio_high : o.ratio_low);
  const bool is_clipped = advantage > R(0) ? log_ratio > bound : log_ratio < bound;
  return {is_clipped ? bound : log_ratio, !is_clipped};
}

template <class R>
GRPO_HOST_DEVICE Term<R> kl_estimate(R d, const PolicyOptions<R>& o) {  // d = l - l_ref
  switch (o.kl_estimator) {
    case KlEstimator::kK1:
      return {d, R(0), R(1)};
    case KlEstimator::kK2:
      return {d * d / R(2), R(0), d};
    case KlEstimator::kK3: {
      const R growth = std::expm1(-d);
      return {growth + d, R(0), -growth};
    }
    case KlEstimator::kAbs:
      return {std::fabs(d), R(0), d > R(0) ? R(1) : (d < R(0) ? R(-1) : d)};
  }
  return {R(NAN), R(NAN), R(NAN)};
}

// The same, of d clamped to its limits.
template <class R>
GRPO_HOST_DEVICE Term<R> limited_kl_estimate(R d, const PolicyOptions<R>& o) {
  const R low = o.kl_estimator == KlEstimator::kK3 ? -Limit<R>::kLogRatio : -Limit<R>::kDistance;
  Term<R> k = kl_estimate(clamp(d, low, Limit<R>::kDistance), o);
  k.is_infinite = d < low || d > Limit<R>::kDistance;
  return k;
}

// The importance ratio that weights a token: its own, or its sequence's.
template <class R>
struct Ratio {
  R log, limited_log;
  R value;        // exp(limited_log)
  bool is_single_token;  // the ratio depends on this token only

  GRPO_HOST_DEVICE bool exceeds_limit() const { return log > limited_log; }
};

// r k3 far below the reference: r exp(-d) as one exponential, because exp(-d) may overflow while r underflows. If the
// joint exponent is inf - inf, a single token has the limit ref / old; a token of a longer sequence is unbounded.
template <class R>
GRPO_HOST_DEVICE Term<R> far_k3(R joint, R reference_log_ratio, const Ratio<R>& ratio, bool is_d_clamped) {
  if (joint != joint && ratio.log == ratio.log) joint = ratio.is_single_token ? reference_log_ratio : R(INFINITY);
  const bool exceeds_limit = joint > Limit<R>::kJoint;
  const R value = std::exp(exceeds_limit ? Limit<R>::kJoint : joint);
  return {value, value, is_d_clamped ? R(0) : -value, exceeds_limit};
}

// The clamped KL estimate and its derivatives. `kl_gradient` selects the derivative by the log-probability: the
// estimate's own, k2's (straight-through), or that of the estimate times exp(l - stop_gradient(l))
// (importance-weighted). With bias_corrected_kl everything is multiplied by the ratio.
template <bool kAtLimits, class R>
GRPO_HOST_DEVICE Term<R> kl_penalty(R logprob, R ref_logprob, R old_logprob, const Ratio<R>& ratio,
                                    const PolicyOptions<R>& o) {
  const R difference = logprob - ref_logprob;
  const R d = clamp(difference, -o.log_ratio_clamp, o.log_ratio_clamp);
  Term<R> k = kAtLimits ? limited_kl_estimate(d, o) : kl_estimate(d, o);
  const bool is_clamped = k.value < -o.kl_clamp || k.value > o.kl_clamp;
  if (o.kl_gradient == KlGradient::kImportanceWeighted) k.dlogprob += k.value;
  if (is_clamped) k.dlogprob = R(0), k.is_infinite = false;
  if (o.kl_gradient == KlGradient::kStraightThrough) {
    k.dlogprob = kAtLimits ? clamp(d, -Limit<R>::kDistance, Limit<R>::kDistance) : d;
  }
  const bool is_d_clamped = d != difference && difference == difference;
  if (is_d_clamped) k.dlogprob = R(0);
  k.value = clamp(k.value, -o.kl_clamp, o.kl_clamp);
  if (!o.bias_corrected_kl) return k;
  if constexpr (kAtLimits) {
    const bool is_far = d < -Limit<R>::kNear || ratio.limited_log - d > Limit<R>::kJoint;
    if (o.kl_estimator == KlEstimator::kK3 && is_far && !is_clamped) {
      return far_k3(ratio.log - d, ref_logprob - old_logprob, ratio, is_d_clamped);
    }
    k.is_infinite = ratio.value != 0 && k.value != 0 && (k.is_infinite || ratio.exceeds_limit());
    const R value = clamp(k.value * ratio.value, -Limit<R>::kTerm, Limit<R>::kTerm);
    return {value, value, clamp(k.dlogprob * ratio.value, -Limit<R>::kTerm, Limit<R>::kTerm), k.is_infinite};
  }
  return {k.value * ratio.value, k.value * ratio.value, k.dlogprob * ratio.value};
}

// What one unmasked token adds to the loss, without the entropy bonus, and to the metrics.
template <class R>
struct TokenLoss {
  R loss;
  R dlog_ratio;
  R dlogprob;  // the direct part, not through the ratio
  R kl;
  bool is_low;
  bool is_high;
};

// `log_ratio` is the token's own or its sequence's; `is_single_token` says whether it depends on this token only.
// On-policy, `old_logprob` equals `logprob`. An unbounded token has an infinite loss and finite derivatives.
template <bool kAtLimits = true, class R>
GRPO_HOST_DEVICE TokenLoss<R> token_loss(R logprob, R log_ratio, bool is_single_token, R old_logprob,
                                         const R* ref_logprob, R advantage, R policy_weight, R kl_weight,
                                         const PolicyOptions<R>& o) {
  const bool is_clamped = o.level == Level::kToken && std::fabs(log_ratio) > o.log_ratio_clamp;
  if (is_clamped) log_ratio = clamp(log_ratio, -o.log_ratio_clamp, o.log_ratio_clamp);
  const R limited = kAtLimits && log_ratio > Limit<R>::kLogRatio ? Limit<R>::kLogRatio : log_ratio;
  const Ratio<R> ratio{log_ratio, limited, std::exp(limited), is_single_token};
  // a zero advantage or weight makes the policy term 0, even if the ratio is infinite
  const Term<R> s = advantage == 0 || policy_weight == 0 ? Term<R>{R(0), R(0), R(0)}
                                                         : surrogate<kAtLimits>(ratio.value, logprob, advantage, o);
  TokenLoss<R> out{-policy_weight * s.value, -policy_weight * s.dlog_ratio, -policy_weight * s.dlogprob, R(0), false,
                   false};
  bool is_infinite = s.is_infinite || (ratio.exceeds_limit() && s.dlog_ratio != 0);
  if (ref_logprob != nullptr) {
    const Term<R> k = kl_penalty<kAtLimits>(logprob, *ref_logprob, old_logprob, ratio, o);
    const R weight = o.beta * kl_weight;
    out.loss += weight * k.value;
    out.dlog_ratio += weight * k.dlog_ratio;
    out.dlogprob += weight * k.dlogprob;
    out.kl = k.value;
    is_infinite |= k.is_infinite && weight != 0;
  }
  if (kAtLimits && is_infinite && out.loss == out.loss) out.loss = std::copysign(R(INFINITY), out.loss);
  if (is_clamped) out.dlog_ratio = R(0);
  // the clip metrics count as TRL does: after delta
  const R metric_ratio = o.level == Level::kGeometric ? std::exp(logprob - old_logprob) : ratio.value;
  const R bounded = metric_ratio > o.delta ? o.delta : metric_ratio;
  out.is_low = bounded < o.ratio_low && advantage < R(0);
  out.is_high = bounded > o.ratio_high && advantage > R(0);
  return out;
}

}  // namespace grpo
