"""Two rows of logits as Triton device functions: their divergence and its gradient. The only Triton copy."""

from __future__ import annotations

import triton
import triton.language as tl

from grpo_kernels.ops.rows.triton.softmax import load_columns, row_shift, slope_at
from grpo_kernels.ops.tokens.triton.elementary import log_near_one

#: By how the mixture lies, as ``grpo_kernels.loss.config.DIVERGENCES`` names them.
_FORWARD, _REVERSE, BETWEEN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_LN2 = tl.constexpr(0.6931471805599453)
_FLOOR = tl.constexpr(-1e4)


@triton.jit
def over_larger(d, mixture):
    """``m = a q + (1 - a) p`` over the larger of both, for ``d = log p - log q``: nothing overflows, and 1 at 0."""
    w = tl.exp(-tl.abs(d))
    return tl.where(d > 0, (1.0 - mixture) + mixture * w, mixture + (1.0 - mixture) * w)


@triton.jit
def times(probability, log_ratio):
    """``p log``; where a probability is 0 so is its term, whatever the logarithm."""
    return tl.where(probability > 0, probability * log_ratio, 0.0)


@triton.jit
def log_softmax(v, base, log_sum, rate):
    return ((v - base) * rate - log_sum) * _LN2


@triton.jit
def divergence_terms(log_p, log_q, mixture, KIND: tl.constexpr):
    """What the elements add to the divergence, and, of a mixture, to the mean that its gradient is centred by.

    What is added beside a term ``p log`` sums to 0, and makes up for what its logarithm, or both of the log-sum-exps,
    are rounded by: their errors count in second order alone.
    """
    p = tl.exp(log_p)
    q = tl.exp(log_q)
    d = log_p - log_q
    if KIND == _FORWARD:
        value = times(q, -d) + (p - q)
        return value, value
    elif KIND == _REVERSE:
        value = times(p, d) + (q - p)
        return value, value
    else:
        share = over_larger(d, mixture)
        rest = -log_near_one(share)
        of_p = times(p, rest + tl.where(d > 0, 0.0, d))
        of_q = times(q, rest - tl.where(d > 0, d, 0.0))
        m = times(tl.where(d > 0, p, q), share)
        mean = (1.0 - mixture) * p + mixture * q
        return (1.0 - mixture) * of_p + mixture * of_q + (m - mean), of_p


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
    """The divergence, and the mean that its gradient is centred by."""
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
            if KIND == BETWEEN:
                lane_centre += tl.sum(centre, 1)
    value = tl.sum(lane_value, 0)
    if KIND != BETWEEN:
        return value, value
    return value, tl.sum(lane_centre, 0)


@triton.jit
def divergence_gradient(log_p, p, log_q, centre, mixture, KIND: tl.constexpr):
    """Of the divergence by ``y``."""
    d = log_p - log_q
    if KIND == _FORWARD:
        return p - tl.exp(log_q)
    elif KIND == _REVERSE:
        return times(p, d - centre)
    else:
        log_ratio = tl.where(d > 0, 0.0, d) - log_near_one(over_larger(d, mixture))
        return (1.0 - mixture) * times(p, log_ratio - centre)


@triton.jit
def row_divergence_gradient(
    row_ptr,
    reference_ptr,
    drow_ptr,  # which may lie over the row
    columns,
    vocab,
    base,  # of the log-probabilities
    log_sum,
    inner,
    rate,
    slope,
    own_base,  # of the divergence
    own_log_sum,
    own_rate,
    own_slope,
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
    IS_ONE: tl.constexpr,
    IS_NARROWED: tl.constexpr,
    CURVE: tl.constexpr,
    REFERENCE_CURVE: tl.constexpr,
    ACC: tl.constexpr,
):
    """Writes the gradient of every logit as if none were the token's, from the row's end, as token_logprobs does."""
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
            if IS_ONE:
                log_p = log_policy
                p = policy
            else:
                log_p = log_softmax(v[i], own_base, own_log_sum, own_rate)
                p = tl.exp(log_p)
            of_divergence = c_d * divergence_gradient(log_p, p, log_q, centre, mixture, KIND)
            # without a weight no gradient, not even of an infinite divergence
            gradient += tl.where(c_d != 0, of_divergence * slope_at(v[i], own_slope, CURVE), 0.0)
            gradients += (gradient.to(OUT),)
        if IS_NARROWED:
            tl.debug_barrier()
        for i in tl.static_range(len(columns)):
            at = start + columns[i]
            tl.store(drow_ptr + at, gradients[i], mask=at < vocab)
