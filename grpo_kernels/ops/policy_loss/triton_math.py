"""The per-token maths of the GRPO family as Triton device functions: the only Triton copy.

The same functions as csrc/policy_math.h, and as ops/policy_loss/reference.py with autograd.
"""

from __future__ import annotations

import triton
import triton.language as tl

from grpo_kernels.ops.token_logprobs.triton_math import expm1
from grpo_kernels.options import KL_ESTIMATORS, KL_GRADIENTS, Level, Surrogate

_CLIP, _CISPO, _SAPO = (tl.constexpr(int(s)) for s in (Surrogate.CLIP, Surrogate.CISPO, Surrogate.SAPO))
_TOKEN, _GEOMETRIC = (tl.constexpr(int(level)) for level in (Level.TOKEN, Level.GEOMETRIC))
_STRAIGHT_THROUGH, _IMPORTANCE_WEIGHTED = (
    tl.constexpr(KL_GRADIENTS[name]) for name in ("straight_through", "importance_weighted")
)
_K1, _K2, _K3 = (tl.constexpr(KL_ESTIMATORS[name]) for name in ("k1", "k2", "k3"))


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
def kl_penalty(
    logprob,
    ref_logprob,
    ratio,
    log_ratio_clamp,
    kl_clamp,
    ESTIMATOR: tl.constexpr,
    GRADIENT: tl.constexpr,
    BIAS_CORRECTED: tl.constexpr,
):
    """The estimate, clamped, and its derivatives by the log-ratio and by the log-probability.

    Straight-through, the latter is k2's; importance-weighted, that of the product with a weight ``exp(l - sg l)``;
    bias-corrected, all are times the ratio.
    """
    difference = logprob - ref_logprob
    d = tl.where(difference > log_ratio_clamp, log_ratio_clamp, difference)
    d = tl.where(difference < -log_ratio_clamp, -log_ratio_clamp, d)  # NaN passes
    if ESTIMATOR == _K1:
        kl = d
        dlogprob = tl.zeros_like(d) + 1
    elif ESTIMATOR == _K2:
        kl = d * d / 2
        dlogprob = d
    elif ESTIMATOR == _K3:
        growth = expm1(-d)
        kl = growth + d
        dlogprob = -growth
    else:
        kl = tl.abs(d)
        dlogprob = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))
    if GRADIENT == _IMPORTANCE_WEIGHTED:
        dlogprob += kl
    dlogprob = tl.where((kl > kl_clamp) | (kl < -kl_clamp), 0.0, dlogprob)
    if GRADIENT == _STRAIGHT_THROUGH:
        dlogprob = d
    dlogprob = tl.where((d < difference) | (d > difference), 0.0, dlogprob)
    kl = tl.where(kl > kl_clamp, kl_clamp, tl.where(kl < -kl_clamp, -kl_clamp, kl))
    if BIAS_CORRECTED:
        return kl * ratio, kl * ratio, dlogprob * ratio
    return kl, tl.zeros_like(kl), dlogprob


@triton.jit
def token_loss(
    logprob,
    log_ratio,  # the token's own, or its sequence's
    token_log_ratio,
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
    is_clamped = log_ratio != log_ratio
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
        value = dvalue_direct * logprob
    elif SURROGATE == _SAPO:
        value, dvalue = sapo_surrogate(ratio, advantage, temperature_pos, temperature_neg)
    else:
        dvalue_direct = tl.zeros_like(logprob) + advantage
        value = advantage * logprob
    # without an advantage or a weight the policy term is 0 whatever the ratio, an infinite one included
    is_absent = (advantage == 0) | (policy_weight == 0)
    value = tl.where(is_absent, 0.0, value)
    dvalue = tl.where(is_absent, 0.0, dvalue)
    loss = -policy_weight * value
    dlog_ratio = -policy_weight * dvalue
    dlogprob = -policy_weight * dvalue_direct
    kl = tl.zeros_like(logprob)
    if HAS_REF:
        kl, dkl_log_ratio, dkl_logprob = kl_penalty(
            logprob, ref_logprob, ratio, log_ratio_clamp, kl_clamp, KL_ESTIMATOR, KL_GRADIENT, BIAS_CORRECTED
        )
        loss += beta * kl_weight * kl
        dlog_ratio += beta * kl_weight * dkl_log_ratio
        dlogprob += beta * kl_weight * dkl_logprob
    if LEVEL == _TOKEN:
        dlog_ratio = tl.where(is_clamped, 0.0, dlog_ratio)
    counted = ratio
    if LEVEL == _GEOMETRIC:
        counted = tl.exp(token_log_ratio)
    bounded = tl.where(counted > delta, delta, counted)  # as TRL counts
    is_low = (bounded < ratio_low) & (advantage < 0)
    is_high = (bounded > ratio_high) & (advantage > 0)
    return loss, dlog_ratio, dlogprob, kl, is_low, is_high
