"""The per-token maths of the GRPO family as Triton device functions. The only Triton copy.

The same functions as in csrc/policy_math.h. loss/reference.py has their values; its derivatives are autograd's.
"""

from __future__ import annotations

import ctypes
import math
from collections import namedtuple

import torch
import triton
import triton.language as tl

from grpo_kernels.loss import limits
from grpo_kernels.loss.options import KL_ESTIMATORS, KL_GRADIENTS, Level, Option, Param, Surrogate
from grpo_kernels.ops.tokens.triton.elementary import expm1

_CLIP, _CISPO, _SAPO = (tl.constexpr(int(s)) for s in (Surrogate.CLIP, Surrogate.CISPO, Surrogate.SAPO))
_TOKEN, _GEOMETRIC = (tl.constexpr(int(level)) for level in (Level.TOKEN, Level.GEOMETRIC))
_STRAIGHT_THROUGH, _IMPORTANCE_WEIGHTED = (
    tl.constexpr(KL_GRADIENTS[name]) for name in ("straight_through", "importance_weighted")
)
_LOG_RATIO_FP32, _LOG_RATIO_FP64 = (
    tl.constexpr(limits.largest_log_ratio(dtype)) for dtype in (torch.float32, torch.float64)
)
_TERM_FP32, _TERM_FP64 = (tl.constexpr(limits.largest_term(dtype)) for dtype in (torch.float32, torch.float64))
_JOINT = tl.constexpr(limits.largest_joint(torch.float32) - limits.largest_log_ratio(torch.float32))
_NEAR, _DISTANCE = tl.constexpr(limits.NEAR), tl.constexpr(limits.DISTANCE)
_K1, _K2, _K3 = (tl.constexpr(KL_ESTIMATORS[name]) for name in ("k1", "k2", "k3"))

#: The loss's real parameters as one kernel argument, read by ``decode(params.beta, dtype)``. Each is three fp32
#: numbers, because floats inside a tuple are fp32 and integers there specialise the kernel. No kernel may name the
#: argument ``params``: Triton's launcher has a variable of that name.
LossParams = namedtuple("LossParams", [param.name.lower() for param in Param])
#: The options that the loss's maths is compiled for, as one constexpr.
LossVariant = namedtuple("LossVariant", [option.name.lower() for option in Option])


def encode(params: list[float]) -> LossParams:
    """The real parameters as a kernel argument."""
    if len(params) != len(Param):
        raise ValueError(f"params must have {len(Param)} entries, got {len(params)}")
    return LossParams(*(_parts(value) for value in params))


def _parts(value: float) -> tuple[float, float, float]:
    """Three fp32 numbers whose sum is ``value``, each the nearest to what is left. Exact from 1e-29 to the largest fp32
    number; infinite above."""
    high = _fp32(value)
    if math.isinf(high):
        return high, 0.0, 0.0
    middle = _fp32(value - high)
    return high, middle, value - high - middle


def _fp32(value: float) -> float:
    return ctypes.c_float(value).value


def loss_variant(options: list[int]) -> LossVariant:
    """The options as a constexpr.

    Raises:
        ValueError: An option is unknown to these kernels.
    """
    if len(options) != len(Option):
        raise ValueError(f"options must have {len(Option)} entries, got {len(options)}")
    allowed = {Option.SURROGATE: Surrogate, Option.LEVEL: Level, Option.KL_ESTIMATOR: KL_ESTIMATORS.values()}
    for option, values in allowed.items():
        if options[option] not in list(values):
            raise ValueError(f"options must have a {option.name} that the kernels know, got {options[option]}")
    return LossVariant(*options)


@triton.jit
def decode(parts, dtype: tl.constexpr):
    """A parameter in the arithmetic type."""
    if dtype == tl.float64:
        rest = tl.full([], parts[1], tl.float64) + tl.full([], parts[2], tl.float64)
        return tl.full([], parts[0], tl.float64) + rest
    else:
        return tl.full([], parts[0], dtype)


@triton.jit
def largest_log_ratio(x):
    """The largest log-ratio: above it the ratio counts as infinite."""
    return _LOG_RATIO_FP64 if x.dtype == tl.float64 else _LOG_RATIO_FP32


@triton.jit
def clamp(x, low, high):
    """``x`` between the bounds; NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def clip_surrogate(ratio, advantage, params):
    """``min(min(r, delta) A, clip(r) A)`` and its derivative by the log-ratio.

    On a bound and at a tie the derivative is autograd's: a clamp passes the gradient on its bounds, and a minimum of
    equal terms passes half to each.
    """
    ratio_low = decode(params.ratio_low, ratio.dtype)
    ratio_high = decode(params.ratio_high, ratio.dtype)
    delta = decode(params.delta, ratio.dtype)
    unclipped = tl.where(ratio > delta, delta, ratio) * advantage
    clipped = clamp(ratio, ratio_low, ratio_high) * advantage
    d_unclipped = tl.where(ratio > delta, 0.0, ratio * advantage)  # NaN stays NaN
    d_clipped = tl.where((ratio < ratio_low) | (ratio > ratio_high), 0.0, ratio * advantage)
    value = tl.where(clipped < unclipped, clipped, unclipped)
    equal = 0.5 * (d_unclipped + d_clipped)
    dlog_ratio = tl.where(unclipped < clipped, d_unclipped, tl.where(clipped < unclipped, d_clipped, equal))
    return value, dlog_ratio


@triton.jit
def sapo_surrogate(ratio, advantage, params):
    """``4 / tau sigmoid(tau (r - 1)) A`` and its derivative by the log-ratio."""
    temperature_pos = decode(params.temperature_pos, ratio.dtype)
    temperature_neg = decode(params.temperature_neg, ratio.dtype)
    tau = tl.where(advantage > 0, temperature_pos, temperature_neg)
    gate = 1 / (1 + tl.exp(-tau * (ratio - 1)))
    return gate * 4 / tau * advantage, 4 * gate * (1 - gate) * ratio * advantage


@triton.jit
def averaged_log_ratio(log_ratio, advantage, params, VARIANT: tl.constexpr):
    """A token's log-ratio as it enters its sequence's mean, and whether it has a gradient: GMPO clips it."""
    passes = log_ratio == log_ratio
    if VARIANT.level == _GEOMETRIC:
        ratio_low = decode(params.ratio_low, log_ratio.dtype)
        ratio_high = decode(params.ratio_high, log_ratio.dtype)
        bound = tl.where(advantage > 0, tl.log(ratio_high), tl.log(ratio_low))
        is_clipped = tl.where(advantage > 0, log_ratio > bound, log_ratio < bound)
        return tl.where(is_clipped, bound, log_ratio), ~is_clipped
    return log_ratio, passes | True


@triton.jit
def kl_estimate(d, ESTIMATOR: tl.constexpr):
    """The estimate, its derivative, and whether the exact value is unbounded."""
    low = -_DISTANCE
    if ESTIMATOR == _K3:
        low = -largest_log_ratio(d)
    is_infinite = (d < low) | (d > _DISTANCE)
    d = clamp(d, low, _DISTANCE)
    if ESTIMATOR == _K1:
        return d, tl.zeros_like(d) + 1, is_infinite
    elif ESTIMATOR == _K2:
        return d * d / 2, d, is_infinite
    elif ESTIMATOR == _K3:
        growth = expm1(-d)
        return growth + d, -growth, is_infinite
    else:
        return tl.abs(d), tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d)), is_infinite


@triton.jit
def kl_penalty(
    difference,  # logprob - ref_logprob
    log_ratio,  # clamped
    reference_log_ratio,  # the joint exponent if log_ratio and difference are both -inf
    params,
    VARIANT: tl.constexpr,
):
    """The clamped estimate, its derivatives by the log-ratio and the log-probability, and whether it is unbounded.

    The derivative by the log-probability is the estimate's own, k2's (straight-through), or that of the estimate times
    ``exp(l - stop_gradient(l))`` (importance-weighted). Bias correction multiplies everything by the ratio.
    """
    log_ratio_clamp = decode(params.log_ratio_clamp, difference.dtype)
    kl_clamp = decode(params.kl_clamp, difference.dtype)
    d = clamp(difference, -log_ratio_clamp, log_ratio_clamp)
    kl, dlogprob, is_infinite = kl_estimate(d, VARIANT.kl_estimator)
    if VARIANT.kl_gradient == _IMPORTANCE_WEIGHTED:
        dlogprob += kl
    is_clamped = (kl > kl_clamp) | (kl < -kl_clamp)
    is_infinite = is_infinite & ~is_clamped
    dlogprob = tl.where(is_clamped, 0.0, dlogprob)
    if VARIANT.kl_gradient == _STRAIGHT_THROUGH:
        dlogprob = clamp(d, -_DISTANCE, _DISTANCE)
    is_d_clamped = (d < difference) | (d > difference)
    dlogprob = tl.where(is_d_clamped, 0.0, dlogprob)
    kl = clamp(kl, -kl_clamp, kl_clamp)
    if not VARIANT.bias_corrected_kl:
        return kl, tl.zeros_like(kl), dlogprob, is_infinite
    largest = largest_log_ratio(d)
    limited = tl.where(log_ratio > largest, largest, log_ratio)
    ratio = tl.exp(limited)
    largest_term = _TERM_FP64 if d.dtype == tl.float64 else _TERM_FP32
    is_infinite = (ratio != 0) & (kl != 0) & (is_infinite | (log_ratio > largest))
    kl = clamp(kl * ratio, -largest_term, largest_term)
    dlogprob = clamp(dlogprob * ratio, -largest_term, largest_term)
    if VARIANT.kl_estimator == _K3:  # far below the reference exp(-d) may overflow while the ratio underflows
        is_far = ((d < -_NEAR) | (limited - d > largest + _JOINT)) & ~is_clamped
        joint = log_ratio - d
        joint = tl.where((joint != joint) & (log_ratio == log_ratio), reference_log_ratio, joint)
        exceeds_limit = joint > largest + _JOINT
        far = tl.exp(tl.where(exceeds_limit, largest + _JOINT, joint))
        kl = tl.where(is_far, far, kl)
        dlogprob = tl.where(is_far, tl.where(is_d_clamped, 0.0, -far), dlogprob)
        is_infinite = tl.where(is_far, exceeds_limit, is_infinite)
    return kl, kl, dlogprob, is_infinite


@triton.jit
def token_loss(
    logprob,
    log_ratio,  # the token's own, or its sequence's
    is_single_token,  # whether log_ratio depends on this token only
    old_logprob,  # on-policy: logprob
    ref_logprob,
    advantage,
    policy_weight,
    kl_weight,
    params,  # LossParams
    HAS_REF: tl.constexpr,
    VARIANT: tl.constexpr,  # LossVariant
):
    """The contribution of an unmasked token to the loss, without the entropy bonus, and to the metrics.

    Returns:
        loss, its derivatives by the log-ratio and (directly) by the log-probability, KL, clipped low, clipped high. An
        unbounded token has an infinite loss and finite derivatives.
    """
    ratio_low = decode(params.ratio_low, logprob.dtype)
    ratio_high = decode(params.ratio_high, logprob.dtype)
    is_clamped = log_ratio != log_ratio
    if VARIANT.level == _TOKEN:
        log_ratio_clamp = decode(params.log_ratio_clamp, logprob.dtype)
        is_clamped = tl.abs(log_ratio) > log_ratio_clamp
        log_ratio = tl.where(is_clamped, tl.where(log_ratio > 0, log_ratio_clamp, -log_ratio_clamp), log_ratio)
    largest = largest_log_ratio(log_ratio)
    exceeds_limit = log_ratio > largest
    is_below_limit = logprob < -_DISTANCE
    ratio = tl.exp(tl.where(exceeds_limit, largest, log_ratio))
    limited_logprob = tl.where(is_below_limit, -_DISTANCE, logprob)
    dvalue = tl.zeros_like(logprob)
    dvalue_direct = tl.zeros_like(logprob)
    if VARIANT.level == _GEOMETRIC:  # clipped token by token
        value = ratio * advantage
        dvalue = ratio * advantage
    elif VARIANT.surrogate == _CLIP:
        value, dvalue = clip_surrogate(ratio, advantage, params)
    elif VARIANT.surrogate == _CISPO:
        dvalue_direct = clamp(ratio, ratio_low, ratio_high) * advantage
        value = dvalue_direct * limited_logprob
    elif VARIANT.surrogate == _SAPO:
        value, dvalue = sapo_surrogate(ratio, advantage, params)
    else:
        dvalue_direct = tl.zeros_like(logprob) + advantage
        value = advantage * limited_logprob
    # a zero advantage or weight makes the policy term 0, even if the ratio is infinite
    is_zero = (advantage == 0) | (policy_weight == 0)
    value = tl.where(is_zero, 0.0, value)
    dvalue = tl.where(is_zero, 0.0, dvalue)
    loss = -policy_weight * value
    dlog_ratio = -policy_weight * dvalue
    dlogprob = -policy_weight * dvalue_direct
    is_infinite = (exceeds_limit & (dlog_ratio != 0)) | (is_below_limit & (dlogprob != 0))
    kl = tl.zeros_like(logprob)
    if HAS_REF:
        kl, dkl_log_ratio, dkl_logprob, is_kl_infinite = kl_penalty(
            logprob - ref_logprob,
            log_ratio,
            tl.where(is_single_token, ref_logprob - old_logprob, float("inf")),
            params,
            VARIANT,
        )
        weight = decode(params.beta, logprob.dtype) * kl_weight
        loss += weight * kl
        dlog_ratio += weight * dkl_log_ratio
        dlogprob += weight * dkl_logprob
        is_infinite = is_infinite | (is_kl_infinite & (weight != 0))
    loss = tl.where(is_infinite & (loss == loss), tl.where(loss < 0, float("-inf"), float("inf")), loss)
    if VARIANT.level == _TOKEN:
        dlog_ratio = tl.where(is_clamped, 0.0, dlog_ratio)
    metric_ratio = ratio
    if VARIANT.level == _GEOMETRIC:
        metric_ratio = tl.exp(logprob - old_logprob)
    delta = decode(params.delta, logprob.dtype)
    bounded = tl.where(metric_ratio > delta, delta, metric_ratio)  # TRL counts clipping after delta
    is_low = (bounded < ratio_low) & (advantage < 0)
    is_high = (bounded > ratio_high) & (advantage > 0)
    return loss, dlog_ratio, dlogprob, kl, is_low, is_high
