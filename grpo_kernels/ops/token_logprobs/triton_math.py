"""Rows of logits as Triton device functions: transform, online softmax, gradient. The only Triton copy.

As in csrc/cpu/row_kernels.cpp, the transform is taken in two steps, ``y = outer v(z)`` with ``outer >= 0``, and
differences are taken of ``v``: what all logits have in common costs no digits then. Kernels take ``inner``, ``outer``
and other real arguments in fp64, for fp64 logits, and bring them to the arithmetic's type by ``tl.full([], x, ACC)``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expm1(x):
    """``e^x - 1``; near 0 a series, where the difference would lose its digits."""
    series = x * 0.0 + 1.0
    # below an ulp of fp32, or of fp64, for |x| < 0.35
    TERMS: tl.constexpr = 15 if x.dtype == tl.float64 else 8
    for k in tl.static_range(TERMS, 1, -1):
        series = 1.0 + series * x * (1.0 / k)
    return tl.where(tl.abs(x) < 0.35, x * series, tl.exp(x) - 1.0)


@triton.jit
def bounded(exponent):
    """An exponent that may be -inf, with the same exponential (0), and a product with it that is not NaN."""
    return tl.where(exponent < -1e4, -1e4, exponent)


@triton.jit
def transform(z, inner, SOFTCAP: tl.constexpr):
    """``v``: ``tanh(inner z)`` with a softcap, else ``inner z``, where ``inner`` is 1 or -1."""
    if SOFTCAP:
        x = z * inner
        m = expm1(-2.0 * tl.abs(x))  # no overflow, and no digit lost near 0
        t = -m / (m + 2.0)
        return tl.where(x < 0, -t, t)
    return z * inner


@triton.jit
def transform_slope(v, slope, SOFTCAP: tl.constexpr):
    """``dy/dz`` at ``v``."""
    if SOFTCAP:
        return (1.0 - v * v) * slope
    return tl.zeros_like(v) + slope


@triton.jit
def row_offset(b, t, batch_stride, row_stride, ALIGNED: tl.constexpr):
    """Where row ``t`` of completion ``b`` begins; ``ALIGNED`` where both strides are multiples of 16."""
    offset = b * batch_stride + t * row_stride
    if ALIGNED:
        offset = tl.multiple_of(offset, 16)
    return offset


@triton.jit
def row_statistics(row_ptr, vocab, inner, outer, SOFTCAP: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Maximum of ``v``, ``sum e^(y - max y)`` and ``sum (y - max y) e^(y - max y)``, in one read of the row.

    The state is kept per lane and merged once at the end: no reduction across threads within the loop. Columns beyond
    the vocabulary count as -inf. NaN is never a maximum, and reaches the sums.
    """
    columns = tl.arange(0, BLOCK)
    lane_max = tl.full([BLOCK], float("-inf"), ACC)
    lane_sum = tl.zeros([BLOCK], ACC)
    lane_weighted = tl.zeros([BLOCK], ACC)
    for start in range(0, vocab, BLOCK):
        inside = start + columns < vocab
        z = tl.load(row_ptr + start + columns, mask=inside, other=0.0).to(ACC)
        v = tl.where(inside, transform(z, inner, SOFTCAP), float("-inf"))
        largest = tl.where(v > lane_max, v, lane_max)
        base = tl.where(largest == float("-inf"), 0.0, largest)  # a lane of -inf alone has nothing to subtract
        shift = bounded((lane_max - base) * outer)
        factor = tl.exp(shift)
        t = bounded((v - base) * outer)
        e = tl.exp(t)
        lane_weighted = (lane_weighted + shift * lane_sum) * factor + t * e
        lane_sum = lane_sum * factor + e
        lane_max = largest
    row_max = tl.max(lane_max, 0)
    shift = bounded((lane_max - row_max) * outer)
    factor = tl.exp(shift)
    weighted = tl.sum((lane_weighted + shift * lane_sum) * factor, 0)
    return row_max, tl.sum(lane_sum * factor, 0), weighted


@triton.jit
def log_sum_exp(row_max, row_sum, outer):
    """Of ``y``, in fp64; ``outer`` as the kernel was given it."""
    return row_max.to(tl.float64) * tl.full([], outer, tl.float64) + tl.log(row_sum.to(tl.float64))


@triton.jit
def row_gradient(
    row_ptr,
    drow_ptr,
    vocab,
    token,
    logprob,
    lse,
    entropy,
    c,
    c_h,
    inner,
    outer,
    slope,
    HAS_ENTROPY: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes ``[c (onehot(id) - p) - c_H p (log p + H)] f'(z)`` to ``drow_ptr``, which may be ``row_ptr``.

    ``lse`` is fp64, ``outer`` and ``slope`` are as the kernel was given them.
    """
    # log p = (v - v_lse) outer - rest: in two parts, or an offset common to all logits would cost p its digits
    scale = tl.full([], outer, tl.float64)
    v_lse = (lse / tl.where(scale == 0.0, 1.0, scale)).to(ACC)
    rest = (lse - v_lse.to(tl.float64) * scale).to(ACC)
    factor = tl.full([], outer, ACC)
    at_token = -expm1(logprob) * c  # 1 - p without losing the digits of a p near 1
    if HAS_ENTROPY:
        at_token -= c_h * tl.exp(logprob) * (bounded(logprob) + entropy)
    columns = tl.arange(0, BLOCK)
    for start in range(0, vocab, BLOCK):
        inside = start + columns < vocab
        z = tl.load(row_ptr + start + columns, mask=inside, other=0.0, eviction_policy="evict_first").to(ACC)
        v = transform(z, tl.full([], inner, ACC), SOFTCAP)
        log_p = (v - v_lse) * factor - rest
        gradient = -c * tl.exp(log_p)
        if HAS_ENTROPY:
            gradient -= c_h * tl.exp(log_p) * (bounded(log_p) + entropy)
        gradient = tl.where(start + columns == token, at_token, gradient)
        gradient *= transform_slope(v, tl.full([], slope, ACC), SOFTCAP)
        tl.store(drow_ptr + start + columns, gradient.to(drow_ptr.dtype.element_ty), mask=inside)


@triton.jit
def zero_row(drow_ptr, vocab, BLOCK: tl.constexpr):
    """Writes 0 to a row."""
    columns = tl.arange(0, BLOCK)
    for start in range(0, vocab, BLOCK):
        zeros = tl.zeros([BLOCK], drow_ptr.dtype.element_ty)
        tl.store(drow_ptr + start + columns, zeros, mask=start + columns < vocab)
