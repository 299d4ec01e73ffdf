"""The per-token maths of the GRPO family as Triton device functions: the only Triton copy.

The same functions as csrc/policy_math.h, and as ops/policy_loss/reference.py with autograd.
"""

from __future__ import annotations

import triton
import triton.language as tl

from grpo_kernels.ops.token_logprobs.triton_math import expm1


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
def kl_penalty(logprob, ref_logprob, ratio, BIAS_CORRECTED: tl.constexpr):
    """k3 and its derivatives by the log-ratio and by the log-probability; bias-corrected, times the ratio."""
    d = ref_logprob - logprob
    growth = expm1(d)
    k3 = growth - d
    if BIAS_CORRECTED:
        return k3 * ratio, k3 * ratio, -growth * ratio
    return k3, tl.zeros_like(k3), -growth


@triton.jit
def token_loss(
    logprob,
    log_ratio,
    ref_logprob,
    advantage,
    policy_weight,
    kl_weight,
    ratio_low,
    ratio_high,
    delta,
    beta,
    HAS_REF: tl.constexpr,
    BIAS_CORRECTED: tl.constexpr,
):
    """What an unmasked token adds to the loss, without the entropy bonus, and to the metrics.

    Returns:
        loss, its derivatives by the log-ratio and (directly) by the log-probability, KL, clipped low, clipped high.
    """
    ratio = tl.exp(log_ratio)
    value, dvalue = clip_surrogate(ratio, advantage, ratio_low, ratio_high, delta)
    # without an advantage the policy term is 0 whatever the ratio, an infinite one included
    value = tl.where(advantage == 0, 0.0, value)
    dvalue = tl.where(advantage == 0, 0.0, dvalue)
    loss = -policy_weight * value
    dlog_ratio = -policy_weight * dvalue
    dlogprob = tl.zeros_like(logprob)
    kl = tl.zeros_like(logprob)
    if HAS_REF:
        kl, dkl_log_ratio, dkl_logprob = kl_penalty(logprob, ref_logprob, ratio, BIAS_CORRECTED)
        loss += beta * kl_weight * kl
        dlog_ratio += beta * kl_weight * dkl_log_ratio
        dlogprob += beta * kl_weight * dkl_logprob
    bounded = tl.where(ratio > delta, delta, ratio)  # as TRL counts
    is_low = (bounded < ratio_low) & (advantage < 0)
    is_high = (bounded > ratio_high) & (advantage > 0)
    return loss, dlog_ratio, dlogprob, kl, is_low, is_high
