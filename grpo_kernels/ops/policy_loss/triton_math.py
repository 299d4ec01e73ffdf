"""The per-token maths of the GRPO family as Triton device functions: the only Triton copy.

The same functions as csrc/policy_math.h, and as ops/policy_loss/reference.py with autograd.
"""

from __future__ import annotations

import triton
import triton.language as tl

from grpo_kernels.ops.token_logprobs.triton_math import expm1
from grpo_kernels.options import KL_ESTIMATORS, KL_GRADIENTS, Level, Surrogate

_CLIP, _CISPO, _SAPO = (tl.constexpr(int(s)) for s in (Surrogate.CLIP, Surrogate.CISPO, Surrogate.SAPO))
_TOKEN, _SEQUENCE_TOKEN, _GEOMETRIC = (
    tl.constexpr(int(level)) for level in (Level.TOKEN, Level.SEQUENCE_TOKEN, Level.GEOMETRIC)
)
_STRAIGHT_THROUGH, _IMPORTANCE_WEIGHTED = (
    tl.constexpr(KL_GRADIENTS[name]) for name in ("straight_through", "importance_weighted")
)
_K1, _K2, _K3 = (tl.constexpr(KL_ESTIMATORS[name]) for name in ("k1", "k2", "k3"))


@triton.jit
def product(weight, x):
    """A product's limit: what is 0 leaves nothing of what is infinite. NaN passes."""
    value = weight * x
    return tl.where((value == value) | (weight != weight) | (x != x), value, 0.0)


@triton.jit
def clip_surrogate(ratio, advantage, ratio_low, ratio_high, delta):
    """``min(min(r, delta) A, clip(r) A)`` and its derivative by the log-ratio.

    On a bound, and where both terms are equal, the derivative is autograd's: a clamp passes it on its bounds, and a
    minimum of equal terms passes half to each.
    """
    unclipped = tl.where(ratio > delta, delta, ratio) * advantage
    clamped = tl.where(ratio < ratio_low, ratio_low, tl.where(ratio > ratio_high, ratio_high, ratio))
    clipped = clamped * advantage
    d_unclipped = tl.where(ratio > delta, 0.0, ratio * advantage)  # NaN passes
    d_clipped = tl.where((ratio < ratio_low) | (ratio > ratio_high), 0.0, ratio * advantage)
    value = tl.where(clipped < unclipped, clipped, unclipped)
    equal = 0.5 * (d_unclipped + d_clipped)
    dlog_ratio = tl.where(unclipped < clipped, d_unclipped, tl.where(clipped < unclipped, d_clipped, equal))
    return value, dlog_ratio


@triton.jit
def sapo_surrogate(ratio, advantage, temperature_pos, temperature_neg):
    """``4 / tau sigmoid(tau (r - 1)) A`` and its derivative by the log-ratio."""
    tau = tl.where(advantage > 0, temperature_pos, temperature_neg)
    gate = 1 / (1 + tl.exp(-tau * (ratio - 1)))
    slope = tl.where(gate == 1, 0.0, 4 * gate * (1 - gate) * ratio)  # of an infinite ratio too
    return gate * 4 / tau * advantage, slope * advantage


@triton.jit
def averaged_log_ratio(log_ratio, advantage, ratio_low, ratio_high, LEVEL: tl.constexpr):
    """A token's log-ratio as its sequence's mean takes it, and whether that passes a gradient: GMPO clips it."""
    passes = log_ratio == log_ratio
    if LEVEL == _GEOMETRIC:
        bound = tl.where(advantage > 0, tl.log(ratio_high), tl.log(ratio_low))
        is_clipped = tl.where(advantage > 0, log_ratio > bound, log_ratio < bound)
        return tl.where(is_clipped, bound, log_ratio), ~is_clipped
    return log_ratio, passes | True


@triton.jit
def kl_estimate(d, ESTIMATOR: tl.constexpr):
    """The estimate, its derivative, and that of its product with a weight that grows as ``exp(l)``.

    The last is the sum of the others, which may be infinite where it is not.
    """
    if ESTIMATOR == _K1:
        return d, tl.zeros_like(d) + 1, d + 1
    elif ESTIMATOR == _K2:
        return d * d / 2, d, d * (d / 2 + 1)
    elif ESTIMATOR == _K3:
        growth = expm1(-d)
        return growth + tl.where(d < -1000, -1000.0, d), -growth, d  # infinite long before
    else:
        sign = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))
        return tl.abs(d), sign, tl.abs(d) + sign


@triton.jit
def reference_ratio(d, log_ratio, reference_log_ratio):
    """``r exp(-d)``, taken at once: ``exp(-d)`` may be past the largest number while ``r`` is below the least."""
    joint = tl.where(reference_log_ratio == reference_log_ratio, reference_log_ratio, log_ratio - d)
    is_lost = (joint != joint) & (log_ratio == log_ratio)
    return tl.exp(tl.where(is_lost, float("inf"), joint))  # of a sequence's, the faster one


@triton.jit
def kl_penalty(
    logprob,
    ref_logprob,
    log_ratio,  # clamped
    reference_log_ratio,  # of the reference over the old policy, where neither log-ratio is clamped; else NaN
    ratio,
    is_own,  # whether the ratio moves with the token's own log-probability
    log_ratio_clamp,
    kl_clamp,
    ESTIMATOR: tl.constexpr,
    GRADIENT: tl.constexpr,
    BIAS_CORRECTED: tl.constexpr,
):
    """The estimate, clamped, and its derivatives by the log-ratio and by the log-probability.

    Straight-through, the latter is k2's; importance-weighted, that of the product with a weight ``exp(l - sg l)``;
    bias-corrected, all are times the ratio, and where that is the token's own, the former is of both.
    """
    difference = logprob - ref_logprob
    d = tl.where(difference > log_ratio_clamp, log_ratio_clamp, difference)
    d = tl.where(difference < -log_ratio_clamp, -log_ratio_clamp, d)  # NaN passes
    is_d_clamped = (d < difference) | (d > difference)
    kl, dlogprob, dweighted = kl_estimate(d, ESTIMATOR)
    if GRADIENT == _IMPORTANCE_WEIGHTED:
        dlogprob = dweighted
    is_clamped = (kl > kl_clamp) | (kl < -kl_clamp)
    dlogprob = tl.where(is_clamped, 0.0, dlogprob)
    if GRADIENT == _STRAIGHT_THROUGH:
        dlogprob = d
    dlogprob = tl.where(is_d_clamped, 0.0, dlogprob)
    kl = tl.where(kl > kl_clamp, kl_clamp, tl.where(kl < -kl_clamp, -kl_clamp, kl))
    if not BIAS_CORRECTED:
        return kl, tl.zeros_like(kl), dlogprob
    kl, dlogprob = product(ratio, kl), product(ratio, dlogprob)
    if ESTIMATOR == _K3:
        is_far = (d < -40) & ~is_clamped  # where the rest of k3 is below an ulp of it
        value = reference_ratio(d, log_ratio, reference_log_ratio)
        kl = tl.where(is_far, value, kl)
        dlogprob = tl.where(is_far & ~is_d_clamped, -value, dlogprob)
    dlog_ratio = tl.where(is_clamped | is_d_clamped, kl, product(ratio, dweighted))
    return kl, tl.where(is_own, dlog_ratio, kl), tl.where(is_own, 0.0, dlogprob)


@triton.jit
def token_loss(
    logprob,
    log_ratio,  # the token's own, or its sequence's
    old_logprob,  # on-policy the log-probability itself
    ref_logprob,
    advantage,
    policy_weight,
    kl_weight,
    ratio_low,
    ratio_high,
    delta,
    beta,
    temperature_pos,
    temperature_neg,
    log_ratio_clamp,
    kl_clamp,
    HAS_REF: tl.constexpr,
    SURROGATE: tl.constexpr,
    LEVEL: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    KL_GRADIENT: tl.constexpr,
    BIAS_CORRECTED: tl.constexpr,
):
    """What an unmasked token adds to the loss, without the entropy bonus, and to the metrics.

    Returns:
        loss, its derivatives by the log-ratio and (directly) by the log-probability, KL, clipped low, clipped high.
    """
    is_own = log_ratio == log_ratio
    is_clamped = ~is_own
    if LEVEL == _TOKEN:
        is_clamped = tl.abs(log_ratio) > log_ratio_clamp
        log_ratio = tl.where(is_clamped, tl.where(log_ratio > 0, log_ratio_clamp, -log_ratio_clamp), log_ratio)
    ratio = tl.exp(log_ratio)
    dvalue = tl.zeros_like(logprob)
    dvalue_direct = tl.zeros_like(logprob)
    if LEVEL == _GEOMETRIC:  # clipped token by token
        value = ratio * advantage
        dvalue = ratio * advantage
    elif SURROGATE == _CLIP:
        value, dvalue = clip_surrogate(ratio, advantage, ratio_low, ratio_high, delta)
    elif SURROGATE == _CISPO:
        weight = tl.where(ratio < ratio_low, ratio_low, tl.where(ratio > ratio_high, ratio_high, ratio))
        dvalue_direct = weight * advantage
        value = product(dvalue_direct, logprob)  # also of a token whose probability, and ratio, is 0
    elif SURROGATE == _SAPO:
        value, dvalue = sapo_surrogate(ratio, advantage, temperature_pos, temperature_neg)
    else:
        dvalue_direct = tl.zeros_like(logprob) + advantage
        value = advantage * logprob
    # without an advantage or a weight the policy term is 0 whatever the ratio, an infinite one included
    is_absent = (advantage == 0) | (policy_weight == 0)
    value = tl.where(is_absent, 0.0, value)
    dvalue = tl.where(is_absent, 0.0, dvalue)
    loss = product(-policy_weight, value)
    dlog_ratio = product(-policy_weight, dvalue)
    dlogprob = product(-policy_weight, dvalue_direct)
    kl = tl.zeros_like(logprob)
    if HAS_REF:
        reference_log_ratio = ref_logprob - old_logprob
        if LEVEL == _TOKEN:
            is_own = ~is_clamped
            is_free = is_own & (tl.abs(logprob - ref_logprob) <= log_ratio_clamp)
            reference_log_ratio = tl.where(is_free, reference_log_ratio, float("nan"))
        else:
            is_own = (is_own | True) & (LEVEL == _SEQUENCE_TOKEN)
            reference_log_ratio = tl.where(is_own | True, float("nan"), reference_log_ratio)
        kl, dkl_log_ratio, dkl_logprob = kl_penalty(
            logprob,
            ref_logprob,
            log_ratio,
            reference_log_ratio,
            ratio,
            is_own,
            log_ratio_clamp,
            kl_clamp,
            KL_ESTIMATOR,
            KL_GRADIENT,
            BIAS_CORRECTED,
        )
        weight = beta * kl_weight
        loss += product(weight, kl)
        dlog_ratio += product(weight, dkl_log_ratio)
        dlogprob += product(weight, dkl_logprob)
    if LEVEL == _TOKEN:
        dlog_ratio = tl.where(is_clamped, 0.0, dlog_ratio)
    counted = ratio
    if LEVEL == _GEOMETRIC:
        counted = tl.exp(logprob - old_logprob)
    bounded = tl.where(counted > delta, delta, counted)  # as TRL counts
    is_low = (bounded < ratio_low) & (advantage < 0)
    is_high = (bounded > ratio_high) & (advantage > 0)
    return loss, dlog_ratio, dlogprob, kl, is_low, is_high
