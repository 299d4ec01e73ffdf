"""Two rows of logits as Triton device functions: their divergence and its gradient. The only Triton copy."""

from __future__ import annotations

import triton
import triton.language as tl

from grpo_kernels.ops.token_logprobs.triton_math import load_columns, log_near_one, over_block, row_shift, slope_at

#: By how the mixture lies, as ``grpo_kernels.config.DIVERGENCES`` names them.
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
    LANES: tl.constexpr = columns.shape[1]
    BLOCK: tl.constexpr = LANES * columns.shape[0] * columns.shape[2]
    lane_value = tl.zeros([LANES], ACC)
    lane_centre = tl.zeros([LANES], ACC)
    for start in range(0, vocab, BLOCK):
        at = start + columns
        v = load_columns(row_ptr, at, 0, vocab, inner, float("-inf"), CURVE, ACC)
        u = load_columns(reference_ptr, at, 0, vocab, reference_inner, float("-inf"), REFERENCE_CURVE, ACC)
        log_p = log_softmax(v, base, log_sum, rate)
        log_q = log_softmax(u, reference_base, reference_log_sum, reference_rate)
        p = tl.exp(log_p)
        q = tl.exp(log_q)
        d = log_p - log_q
        # what is added beside a term p log sums to 0, and makes up for what its logarithm, or both of the log-sum-exps,
        # are rounded by: their errors count in second order alone
        if KIND == _FORWARD:
            lane_value += over_block(times(q, -d) + (p - q))
        elif KIND == _REVERSE:
            lane_value += over_block(times(p, d) + (q - p))
        else:
            share = over_larger(d, mixture)
            rest = -log_near_one(share)
            of_p = times(p, rest + tl.where(d > 0, 0.0, d))
            of_q = times(q, rest - tl.where(d > 0, d, 0.0))
            m = times(tl.where(d > 0, p, q), share)
            lane_centre += over_block(of_p)
            mean = (1.0 - mixture) * p + mixture * q
            lane_value += over_block((1.0 - mixture) * of_p + mixture * of_q + (m - mean))
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
    BLOCK: tl.constexpr = columns.shape[0] * columns.shape[1] * columns.shape[2]
    blocks = tl.cdiv(vocab, BLOCK)
    for done in range(0, blocks):
        at = (blocks - 1 - done) * BLOCK + columns
        v = load_columns(row_ptr, at, 0, vocab, inner, float("-inf"), CURVE, ACC)
        u = load_columns(reference_ptr, at, 0, vocab, reference_inner, float("-inf"), REFERENCE_CURVE, ACC)
        log_policy = log_softmax(v, base, log_sum, rate)
        log_q = log_softmax(u, reference_base, reference_log_sum, reference_rate)
        policy = tl.exp(log_policy)
        gradient = -policy * (c + c_h * (tl.maximum(log_policy, _FLOOR) + entropy)) * slope_at(v, slope, CURVE)
        if IS_ONE:
            log_p = log_policy
            p = policy
        else:
            log_p = log_softmax(v, own_base, own_log_sum, own_rate)
            p = tl.exp(log_p)
        of_divergence = c_d * divergence_gradient(log_p, p, log_q, centre, mixture, KIND)
        # without a weight no gradient, not even of an infinite divergence
        gradient += tl.where(c_d != 0, of_divergence * slope_at(v, own_slope, CURVE), 0.0)
        if IS_NARROWED:
            tl.debug_barrier()
        tl.store(drow_ptr + at, gradient.to(drow_ptr.dtype.element_ty), mask=at < vocab)
