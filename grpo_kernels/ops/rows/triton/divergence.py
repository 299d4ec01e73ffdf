"""Triton device functions for the divergence of two rows of logits and its gradient. The only Triton copy."""

from __future__ import annotations

import triton
import triton.language as tl

from grpo_kernels.ops.rows.triton.softmax import load_columns, row_shift, slope_at
from grpo_kernels.ops.tokens.triton.elementary import log_near_one

#: The kind of divergence: mixture 0, mixture 1, and in between; see ``grpo_kernels.loss.config.DIVERGENCES``.
_FORWARD, _REVERSE, JENSEN_SHANNON = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_LN2 = tl.constexpr(0.6931471805599453)
_FLOOR = tl.constexpr(-1e4)


@triton.jit
def mixture_over_larger(d, mixture):
    """``m / max(p, q)`` for ``m = a q + (1 - a) p`` and ``d = log p - log q``. Cannot overflow; 1 at ``d = 0``."""
    w = tl.exp(-tl.abs(d))
    return tl.where(d > 0, (1.0 - mixture) + mixture * w, mixture + (1.0 - mixture) * w)


@triton.jit
def product_or_zero(probability, log_ratio):
    """``probability * log_ratio``; 0 where the probability is 0, even if the logarithm is infinite."""
    return tl.where(probability > 0, probability * log_ratio, 0.0)


@triton.jit
def log_softmax(v, base, log_sum, rate):
    return ((v - base) * rate - log_sum) * _LN2


@triton.jit
def divergence_terms(log_p, log_q, mixture, KIND: tl.constexpr):
    """The terms of the divergence, and of the mean ``centre`` in its gradient ``p (g - centre)``.

    Each ``p log`` term is paired with a difference of probabilities, which sums to 0 over the vocabulary. It cancels
    the first-order effect of the rounding of the logarithm and of both log-sum-exps.
    """
    p = tl.exp(log_p)
    q = tl.exp(log_q)
    d = log_p - log_q
    if KIND == _FORWARD:
        value = product_or_zero(q, -d) + (p - q)
        return value, value
    elif KIND == _REVERSE:
        value = product_or_zero(p, d) + (q - p)
        return value, value
    else:
        ratio = mixture_over_larger(d, mixture)
        log_inverse = -log_near_one(ratio)
        p_term = product_or_zero(p, log_inverse + tl.where(d > 0, 0.0, d))
        q_term = product_or_zero(q, log_inverse - tl.where(d > 0, d, 0.0))
        m = product_or_zero(tl.where(d > 0, p, q), ratio)
        mean = (1.0 - mixture) * p + mixture * q
        return (1.0 - mixture) * p_term + mixture * q_term + (m - mean), p_term


@triton.jit
def row_start(b, t, batch_stride, row_stride, ALIGNMENT: tl.constexpr, VECTOR: tl.constexpr):
    return row_shift(b, t, batch_stride, row_stride, ALIGNMENT, VECTOR)[0]


@triton.jit
def row_divergence(
    row_ptr,
    reference_ptr,
    columns,
    vocab,
    base,
    log_sum,
    inner,
    rate,
    reference_base,
    reference_log_sum,
    reference_inner,
    reference_rate,
    mixture,
    KIND: tl.constexpr,
    CURVE: tl.constexpr,
    REFERENCE_CURVE: tl.constexpr,
    ACC: tl.constexpr,
):
    """The divergence, and the mean ``centre`` in its gradient."""
    LANES: tl.constexpr = columns[0].shape[0]
    BLOCK: tl.constexpr = columns[0].numel * len(columns)
    lane_value = tl.zeros([LANES], ACC)
    lane_centre = tl.zeros([LANES], ACC)
    for start in range(0, vocab, BLOCK):
        v = [load_columns(row_ptr, start + at, 0, vocab, inner, float("-inf"), CURVE, ACC) for at in columns]
        u = [
            load_columns(reference_ptr, start + at, 0, vocab, reference_inner, float("-inf"), REFERENCE_CURVE, ACC)
            for at in columns
        ]
        for i in tl.static_range(len(columns)):
            log_p = log_softmax(v[i], base, log_sum, rate)
            log_q = log_softmax(u[i], reference_base, reference_log_sum, reference_rate)
            value, centre = divergence_terms(log_p, log_q, mixture, KIND)
            lane_value += tl.sum(value, 1)
            if KIND == JENSEN_SHANNON:
                lane_centre += tl.sum(centre, 1)
    value = tl.sum(lane_value, 0)
    if KIND != JENSEN_SHANNON:
        return value, value
    return value, tl.sum(lane_centre, 0)


@triton.jit
def divergence_gradient(log_p, p, log_q, centre, mixture, KIND: tl.constexpr):
    """The derivative of the divergence by ``y``."""
    d = log_p - log_q
    if KIND == _FORWARD:
        return p - tl.exp(log_q)
    elif KIND == _REVERSE:
        return product_or_zero(p, d - centre)
    else:
        log_ratio = tl.where(d > 0, 0.0, d) - log_near_one(mixture_over_larger(d, mixture))
        return (1.0 - mixture) * product_or_zero(p, log_ratio - centre)


@triton.jit
def row_divergence_gradient(
    row_ptr,
    reference_ptr,
    drow_ptr,  # may be the row itself
    columns,
    vocab,
    base,  # at the temperature of the log-probabilities
    log_sum,
    inner,
    rate,
    slope,
    divergence_base,  # at the temperature of the divergence
    divergence_log_sum,
    divergence_rate,
    divergence_slope,
    reference_base,
    reference_log_sum,
    reference_inner,
    reference_rate,
    entropy,
    centre,
    c,
    c_h,
    c_d,
    mixture,
    KIND: tl.constexpr,
    SAME_TEMPERATURE: tl.constexpr,  # the divergence has the temperature of the log-probabilities
    CURVE: tl.constexpr,
    REFERENCE_CURVE: tl.constexpr,
    ACC: tl.constexpr,
):
    """Writes the gradient of a row, from its end. The caller then overwrites the token's own element."""
    BLOCK: tl.constexpr = columns[0].numel * len(columns)
    OUT: tl.constexpr = drow_ptr.dtype.element_ty
    blocks = tl.cdiv(vocab, BLOCK)
    for done in range(0, blocks):
        start = (blocks - 1 - done) * BLOCK
        v = [load_columns(row_ptr, start + at, 0, vocab, inner, float("-inf"), CURVE, ACC) for at in columns]
        u = [
            load_columns(reference_ptr, start + at, 0, vocab, reference_inner, float("-inf"), REFERENCE_CURVE, ACC)
            for at in columns
        ]
        gradients = ()
        for i in tl.static_range(len(columns)):
            log_policy = log_softmax(v[i], base, log_sum, rate)
            log_q = log_softmax(u[i], reference_base, reference_log_sum, reference_rate)
            policy = tl.exp(log_policy)
            gradient = -policy * (c + c_h * (tl.maximum(log_policy, _FLOOR) + entropy)) * slope_at(v[i], slope, CURVE)
            if SAME_TEMPERATURE:
                log_p = log_policy
                p = policy
            else:
                log_p = log_softmax(v[i], divergence_base, divergence_log_sum, divergence_rate)
                p = tl.exp(log_p)
            ddivergence = c_d * divergence_gradient(log_p, p, log_q, centre, mixture, KIND)
            # a zero weight gives a zero gradient even if the divergence is infinite
            gradient += tl.where(c_d != 0, ddivergence * slope_at(v[i], divergence_slope, CURVE), 0.0)
            gradients += (gradient.to(OUT),)
        for i in tl.static_range(len(columns)):
            at = start + columns[i]
            tl.store(drow_ptr + at, gradients[i], mask=at < vocab)
