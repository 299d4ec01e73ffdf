// The per-token maths of the GRPO family, for host and device: ratio, clip, KL, and their derivatives.
//
// The only C++ copy. A new surrogate or KL estimator is a branch here, its constants, and the same in
// ops/policy_loss/reference.py and triton_math.py. Enumerations mirror grpo_kernels/options.py and ops/policy_loss/metrics.py.
#pragma once

#include <cmath>
#include <cstdint>
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

  // From arrays that can be indexed; host only.
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

// A product's limit: what is 0 leaves nothing of what is infinite. NaN passes.
template <class R>
GRPO_HOST_DEVICE R product(R weight, R x) {
  const R value = weight * x;
  return value == value || weight != weight || x != x ? value : R(0);
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

// CISPO: clip(r) A l, its weight detached.
template <class R>
GRPO_HOST_DEVICE Term<R> cispo_surrogate(R ratio, R logprob, R advantage, const PolicyOptions<R>& o) {
  const R weight = clamp(ratio, o.ratio_low, o.ratio_high) * advantage;
  return {product(weight, logprob), R(0), weight};  // also of a token whose probability, and ratio, is 0
}

// SAPO: 4 / tau sigmoid(tau (r - 1)) A.
template <class R>
GRPO_HOST_DEVICE Term<R> sapo_surrogate(R ratio, R advantage, const PolicyOptions<R>& o) {
  const R tau = advantage > R(0) ? o.temperature_pos : o.temperature_neg;
  const R gate = R(1) / (R(1) + std::exp(-tau * (ratio - R(1))));
  const R slope = gate == R(1) ? R(0) : R(4) * gate * (R(1) - gate) * ratio;  // of an infinite ratio too
  return {gate * R(4) / tau * advantage, slope * advantage, R(0)};
}

template <class R>
GRPO_HOST_DEVICE Term<R> surrogate(R ratio, R logprob, R advantage, const PolicyOptions<R>& o) {
  if (o.level == Level::kGeometric) return {ratio * advantage, ratio * advantage, R(0)};  // clipped token by token
  switch (o.surrogate) {
    case Surrogate::kClip:
      return clip_surrogate(ratio, advantage, o);
    case Surrogate::kCispo:
      return cispo_surrogate(ratio, logprob, advantage, o);
    case Surrogate::kSapo:
      return sapo_surrogate(ratio, advantage, o);
    case Surrogate::kLogprob:
      return {advantage * logprob, R(0), advantage};
  }
  return {R(NAN), R(NAN), R(NAN)};  // an option that this build does not know must not pass for a number
}

// A token's log-ratio as its sequence's mean takes it, and whether that passes a gradient. GMPO clips it where the
// ratio would leave the range on the side that the advantage rewards.
template <class R>
struct LogRatio {
  R value;
  bool passes;
};

template <class R>
GRPO_HOST_DEVICE LogRatio<R> averaged_log_ratio(R log_ratio, R advantage, const PolicyOptions<R>& o) {
  if (o.level != Level::kGeometric) return {log_ratio, true};
  const R bound = std::log(advantage > R(0) ? o.ratio_high : o.ratio_low);
  const bool is_clipped = advantage > R(0) ? log_ratio > bound : log_ratio < bound;
  return {is_clipped ? bound : log_ratio, !is_clipped};
}

template <class R>
struct KlEstimate {
  R value;
  R slope;
  R weighted_slope;  // of its product with a weight that grows as exp(l): value + slope, where either may be infinite
};

template <class R>
GRPO_HOST_DEVICE KlEstimate<R> kl_estimate(R d, const PolicyOptions<R>& o) {  // d = l - l_ref
  switch (o.kl_estimator) {
    case KlEstimator::kK1:
      return {d, R(1), d + R(1)};
    case KlEstimator::kK2:
      return {d * d / R(2), d, d * (d / R(2) + R(1))};
    case KlEstimator::kK3: {
      const R growth = std::expm1(-d);
      return {growth + (d < R(-1000) ? R(-1000) : d), -growth, d};  // infinite long before
    }
    case KlEstimator::kAbs: {
      const R sign = d > R(0) ? R(1) : (d < R(0) ? R(-1) : d);
      return {std::fabs(d), sign, std::fabs(d) + sign};
    }
  }
  return {R(NAN), R(NAN), R(NAN)};
}

// The log-ratios that a token's terms are made of.
template <class R>
struct LogRatios {
  R policy;     // over the old policy: the token's own or its sequence's, clamped
  R ratio;      // its exponential
  bool is_own;  // whether it moves with the token's own log-probability, one to one
  R reference;  // of the reference over the old policy; NaN where a log-ratio is clamped, or a sequence's
};

// r exp(-d), taken at once: exp(-d) may be past the largest number while r is below the least.
template <class R>
GRPO_HOST_DEVICE R reference_ratio(R d, const LogRatios<R>& ratios) {
  R joint = ratios.reference == ratios.reference ? ratios.reference : ratios.policy - d;
  if (joint != joint && ratios.policy == ratios.policy) joint = INFINITY;  // of a sequence's, the faster one
  return std::exp(joint);
}

// The estimate, clamped, with its own derivative, k2's, or that of its product with a weight exp(l - sg l); bias-corrected,
// times the ratio.
template <class R>
GRPO_HOST_DEVICE Term<R> kl_penalty(R logprob, R ref_logprob, const LogRatios<R>& ratios, const PolicyOptions<R>& o) {
  const R difference = logprob - ref_logprob;
  const R d = clamp(difference, -o.log_ratio_clamp, o.log_ratio_clamp);
  KlEstimate<R> k = kl_estimate(d, o);
  const bool is_clamped = k.value < -o.kl_clamp || k.value > o.kl_clamp;
  const bool is_d_clamped = d != difference && difference == difference;
  if (o.kl_gradient == KlGradient::kImportanceWeighted) k.slope = k.weighted_slope;
  if (is_clamped) k.slope = R(0);
  if (o.kl_gradient == KlGradient::kStraightThrough) k.slope = d;
  if (is_d_clamped) k.slope = R(0);
  if (!o.bias_corrected_kl) return {clamp(k.value, -o.kl_clamp, o.kl_clamp), R(0), k.slope};
  k.value = clamp(k.value, -o.kl_clamp, o.kl_clamp);
  k = {product(ratios.ratio, k.value), product(ratios.ratio, k.slope), product(ratios.ratio, k.weighted_slope)};
  if (o.kl_estimator == KlEstimator::kK3 && d < R(-40) && !is_clamped) {  // where the rest of k3 is below an ulp of it
    k.value = reference_ratio(d, ratios);
    if (!is_d_clamped) k.slope = -k.value;
  }
  if (!ratios.is_own) return {k.value, k.value, k.slope};
  return {k.value, is_clamped || is_d_clamped ? k.value : k.weighted_slope, R(0)};
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

  // Whether the objective has no bound here: a value to be flagged.
  GRPO_HOST_DEVICE bool is_infinite() const { return std::isinf(loss) || std::isinf(dlog_ratio + dlogprob); }
};

// `log_ratio` is the token's own, or its sequence's. On-policy `old_logprob` is the log-probability itself.
template <class R>
GRPO_HOST_DEVICE TokenLoss<R> token_loss(R logprob, R log_ratio, R old_logprob, const R* ref_logprob, R advantage,
                                         R policy_weight, R kl_weight, const PolicyOptions<R>& o) {
  const bool is_clamped = o.level == Level::kToken && std::fabs(log_ratio) > o.log_ratio_clamp;
  if (is_clamped) log_ratio = clamp(log_ratio, -o.log_ratio_clamp, o.log_ratio_clamp);
  const R ratio = std::exp(log_ratio);
  // without an advantage or a weight the policy term is 0 whatever the ratio, an infinite one included
  const Term<R> s = advantage == 0 || policy_weight == 0 ? Term<R>{R(0), R(0), R(0)} : surrogate(ratio, logprob, advantage, o);
  TokenLoss<R> out{product(-policy_weight, s.value), product(-policy_weight, s.dlog_ratio),
                   product(-policy_weight, s.dlogprob), R(0), false, false};
  if (ref_logprob != nullptr) {
    const bool is_free = o.level == Level::kToken && !is_clamped;
    const bool is_near = !(std::fabs(logprob - *ref_logprob) > o.log_ratio_clamp);
    const LogRatios<R> ratios{log_ratio, ratio, is_free || o.level == Level::kSequenceToken,
                              is_free && is_near ? *ref_logprob - old_logprob : R(NAN)};
    const Term<R> k = kl_penalty(logprob, *ref_logprob, ratios, o);
    const R weight = o.beta * kl_weight;
    out.loss += product(weight, k.value);
    out.dlog_ratio += product(weight, k.dlog_ratio);
    out.dlogprob += product(weight, k.dlogprob);
    out.kl = k.value;
  }
  if (is_clamped) out.dlog_ratio = R(0);
  const R counted = o.level == Level::kGeometric ? std::exp(logprob - old_logprob) : ratio;
  const R bounded = counted > o.delta ? o.delta : counted;  // as TRL counts
  out.is_low = bounded < o.ratio_low && advantage < R(0);
  out.is_high = bounded > o.ratio_high && advantage > R(0);
  return out;
}

}  // namespace grpo
