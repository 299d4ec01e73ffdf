"""Triton device functions for rows of logits: addresses, online softmax, gradient. The only Triton copy.

Exponentials are powers of 2. With ``y = outer v(z)``, where ``v`` is ``z`` or ``tanh(inner z)``, the exponent of an
element is ``t = (v - base) rate`` for ``rate = outer log2 e``. The subtraction comes first: then an offset that all
logits share costs no precision, and the largest logit has exponent 0 exactly. Kernels take ``inner``, ``rate`` and
``slope`` in fp64, because logits may be fp64, and convert them to the arithmetic type by ``tl.full([], x, ACC)``.

A block is a tuple of UNROLL parts, which are tensors ``[LANES, VECTOR]``. A lane is a thread, and a vector is one load
of 16 bytes. A thread loads all its vectors of a block before it uses one. The online state is per lane, so the loop
over a row needs no reduction across threads, and UNROLL * VECTOR elements share one rescaling. UNROLL is not a tensor
dimension, because some Triton releases spread such a dimension over threads: with ``[UNROLL, LANES, VECTOR]`` Triton
3.6 exchanged maxima and sums between threads in every block. A row's edges, which do not fill a block, go part by part.
"""

from __future__ import annotations

import triton
import triton.language as tl

from grpo_kernels.ops.tokens.triton.elementary import expm1, log2, tanh

#: The curve ``v``; mirrors launch.Curve.
_SOFTCAP = tl.constexpr(1)
#: The alignment of rows; mirrors launch.Alignment.
_SHIFTED, _LOOSE = tl.constexpr(1), tl.constexpr(2)
#: An exponent whose power is 0, as for -inf; unlike -inf, its product with 0 is not NaN.
_FLOOR = tl.constexpr(-1e4)
#: The lowest finite fp32 number: the base if every logit is -inf.
_LOWEST = tl.constexpr(-3.4028234663852886e38)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def transform(z, inner, CURVE: tl.constexpr):
    """``v`` of logits in the arithmetic type."""
    if CURVE == _SOFTCAP:
        return tanh(z * inner)
    return z


@triton.jit
def row_shift(b, t, batch_stride, row_stride, ALIGNMENT: tl.constexpr, VECTOR: tl.constexpr):
    """Offset of row ``t`` of completion ``b``, rounded down to a multiple of VECTOR, and the remainder in elements.

    No early return: Triton compiles the code after one too, and its ``multiple_of`` would apply to every alignment.
    """
    offset = tl.cast(b, tl.int64) * batch_stride + tl.cast(t, tl.int64) * row_stride
    shift = 0
    if ALIGNMENT == _SHIFTED:
        shift = (offset % VECTOR).to(tl.int32)
        offset = tl.multiple_of(offset - shift, VECTOR)
    elif ALIGNMENT != _LOOSE:
        offset = tl.multiple_of(offset, VECTOR)
    return offset, shift


@triton.jit
def block_columns(LANES: tl.constexpr, UNROLL: tl.constexpr, VECTOR: tl.constexpr):
    """The columns of a block, one tensor per part; those of a thread's vector are adjacent."""
    first = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    columns = ()
    for i in tl.static_range(UNROLL):
        columns += (first + i * LANES * VECTOR,)
    return columns


@triton.jit
def row_edges(extent, BLOCK: tl.constexpr, PART: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Where a row's whole blocks begin and end, and the number of parts in its edges."""
    begin = PART if ALIGNMENT == _SHIFTED else 0  # a row may begin within its first part
    end = begin + tl.maximum(extent - begin, 0) // BLOCK * BLOCK
    return begin, end, tl.cdiv(tl.maximum(extent - end, 0), PART) + begin // PART


@triton.jit
def edge_start(edge, end, PART: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Where an edge begins. A shifted row has its first edge before the whole blocks; all others are after them."""
    if ALIGNMENT == _SHIFTED:
        return 0 if edge == 0 else end + (edge - 1) * PART
    else:
        return end + edge * PART


@triton.jit
def sum_block(values):
    """The sum of each lane's elements of a block."""
    total = tl.sum(values[0], 1)
    for i in tl.static_range(1, len(values)):
        total += tl.sum(values[i], 1)
    return total


@triton.jit
def add_block(block, lane_max, lane_sum, lane_weighted, rate):
    """Adds a block of ``v`` to the state of the lanes."""
    largest = lane_max
    for i in tl.static_range(len(block)):
        largest = tl.maximum(largest, tl.max(block[i], 1))
    base = tl.maximum(largest, _LOWEST)
    shift = tl.maximum((lane_max - base) * rate, _FLOOR)
    factor = tl.exp2(shift)
    powers = ()
    weighted = ()
    for i in tl.static_range(len(block)):
        t = (block[i] - base[:, None]) * rate
        e = tl.exp2(t)  # NaN for NaN, 0 for -inf
        powers += (e,)
        weighted += (tl.maximum(t, _FLOOR) * e,)
    lane_weighted = (lane_weighted + shift * lane_sum) * factor + sum_block(weighted)
    return largest, lane_sum * factor + sum_block(powers), lane_weighted


@triton.jit
def load_columns(row_ptr, columns, shift, vocab, inner, fill, CURVE: tl.constexpr, ACC: tl.constexpr):
    """``v`` at columns that count from ``shift`` elements before the row; ``fill`` outside the row."""
    inside = (columns >= shift) & (columns < vocab + shift)
    v = transform(tl.load(row_ptr + columns, mask=inside, other=0.0).to(ACC), inner, CURVE)
    return tl.where(inside, v, fill)


@triton.jit
def row_statistics(
    row_ptr,  # ``shift`` elements before the row
    columns,
    shift,
    vocab,
    inner,
    rate,
    CURVE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ACC: tl.constexpr,
):
    """``base``, ``sum 2^t`` and ``sum t 2^t``, in one pass. The maximum ignores NaN; the sums propagate it."""
    LANES: tl.constexpr = columns[0].shape[0]
    PART: tl.constexpr = columns[0].numel
    BLOCK: tl.constexpr = PART * len(columns)
    lane_max = tl.full([LANES], float("-inf"), ACC)
    lane_sum = tl.zeros([LANES], ACC)
    lane_weighted = tl.zeros([LANES], ACC)
    begin, end, edges = row_edges(vocab + shift, BLOCK, PART, ALIGNMENT)
    block_ptr = row_ptr + begin
    for _ in tl.range(begin, end, BLOCK, loop_unroll_factor=2):  # so that the loads of two blocks come first
        z = [tl.load(block_ptr + at) for at in columns]
        block_ptr += BLOCK
        v = [transform(x.to(ACC), inner, CURVE) for x in z]
        lane_max, lane_sum, lane_weighted = add_block(v, lane_max, lane_sum, lane_weighted, rate)
    for edge in range(0, edges):
        at = edge_start(edge, end, PART, ALIGNMENT) + columns[0]
        v = load_columns(row_ptr, at, shift, vocab, inner, float("-inf"), CURVE, ACC)
        lane_max, lane_sum, lane_weighted = add_block((v,), lane_max, lane_sum, lane_weighted, rate)
    base = tl.maximum(tl.max(lane_max, 0), _LOWEST)
    shift_to_base = tl.maximum((lane_max - base) * rate, _FLOOR)
    factor = tl.exp2(shift_to_base)
    return base, tl.sum(lane_sum * factor, 0), tl.sum((lane_weighted + shift_to_base * lane_sum) * factor, 0)


@triton.jit
def row_results(base, row_sum, weighted, target, rate, ACC: tl.constexpr):
    """Log-probability, entropy and log-sum-exp (fp64) of a row; ``target`` is the token's ``v``, ``rate`` is fp64.

    fp64, so that the results are rounded once; it is only a few operations per row.
    """
    log_sum = log2(row_sum)
    logprob = (target - base).to(tl.float64) * rate - log_sum
    entropy = log_sum - (weighted / row_sum).to(tl.float64)
    lse = base.to(tl.float64) * rate + log_sum
    return (logprob * _LN2).to(ACC), (entropy * _LN2).to(ACC), lse * _LN2


@triton.jit
def base_and_log_sum(lse, rate, ACC: tl.constexpr):
    """A base, and the log2 of the sum relative to it, from a log-sum-exp; ``rate`` is fp64."""
    exponent = lse / _LN2
    base = (exponent / tl.where(rate == 0.0, 1.0, rate)).to(ACC)
    return base, (exponent - base.to(tl.float64) * rate).to(ACC)


@triton.jit
def gradient_weights(log_sum, entropy, c, c_h, slope, HAS_ENTROPY: tl.constexpr):
    """``w`` and ``w_t``: the gradient ``-p (c + c_H (log p + H)) slope`` of every logit but the token's is
    ``2^t (w + w_t t)``, with ``log p = (t - log_sum) ln 2``."""
    scale = tl.exp2(-log_sum) * slope
    if HAS_ENTROPY:
        return -(c + c_h * (entropy - log_sum * _LN2)) * scale, -c_h * _LN2 * scale
    return -c * scale, tl.zeros_like(c)


@triton.jit
def slope_at(v, slope, CURVE: tl.constexpr):
    """``dy/dz`` at ``v``."""
    if CURVE == _SOFTCAP:
        return slope * (1.0 - v * v)
    else:
        return slope


@triton.jit
def token_gradient(target, logprob, entropy, c, c_h, slope, CURVE: tl.constexpr):
    """The gradient of the token's own logit. ``1 - p`` is ``-expm1(logprob)``, which stays accurate for p near 1."""
    gradient = -expm1(logprob) * c - c_h * tl.exp(logprob) * (tl.maximum(logprob, _FLOOR) + entropy)
    return gradient * slope_at(target, slope, CURVE)


@triton.jit
def part_gradient(v, base, w, w_t, rate, HAS_ENTROPY: tl.constexpr, CURVE: tl.constexpr):
    """``2^t (w + w_t t)``, times the slope of a softcap."""
    t = (v - base) * rate
    if HAS_ENTROPY:
        w = w + w_t * tl.maximum(t, _FLOOR)
    gradient = tl.exp2(t) * w
    if CURVE == _SOFTCAP:
        gradient *= 1.0 - v * v
    return gradient


@triton.jit
def row_gradient(
    row_ptr,  # ``shift`` elements before the row
    drow_ptr,  # ``shift`` elements before the row's gradient, which may be the row itself
    columns,
    shift,
    vocab,
    base,
    w,
    w_t,
    inner,
    rate,
    HAS_ENTROPY: tl.constexpr,
    CURVE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ACC: tl.constexpr,
):
    """Writes the gradient of a row; the caller then overwrites the token's own element.

    It starts at the row's end, because what the statistics read last is most likely still in the cache. A thread writes
    where it has read, so no thread waits for another.
    """
    PART: tl.constexpr = columns[0].numel
    BLOCK: tl.constexpr = PART * len(columns)
    OUT: tl.constexpr = drow_ptr.dtype.element_ty
    begin, end, edges = row_edges(vocab + shift, BLOCK, PART, ALIGNMENT)
    for edge in range(0, edges):
        at = edge_start(edges - 1 - edge, end, PART, ALIGNMENT) + columns[0]
        v = load_columns(row_ptr, at, shift, vocab, inner, 0.0, CURVE, ACC)
        gradient = part_gradient(v, base, w, w_t, rate, HAS_ENTROPY, CURVE)
        inside = (at >= shift) & (at < vocab + shift)
        tl.store(drow_ptr + at, gradient.to(OUT), mask=inside, eviction_policy="evict_first")
    start = end
    for _ in range(begin, end, BLOCK):
        start -= BLOCK
        z = [tl.load(row_ptr + start + at, eviction_policy="evict_first") for at in columns]
        v = [transform(x.to(ACC), inner, CURVE) for x in z]
        gradient = [part_gradient(x, base, w, w_t, rate, HAS_ENTROPY, CURVE).to(OUT) for x in v]
        for i in tl.static_range(len(columns)):
            tl.store(drow_ptr + start + columns[i], gradient[i], eviction_policy="evict_first")


@triton.jit
def zero_row(
    drow_ptr,  # ``shift`` elements before the row
    columns,
    shift,
    vocab,
    ALIGNMENT: tl.constexpr,
):
    """Fills a row with 0."""
    PART: tl.constexpr = columns[0].numel
    BLOCK: tl.constexpr = PART * len(columns)
    zeros = tl.zeros(columns[0].shape, drow_ptr.dtype.element_ty)
    begin, end, edges = row_edges(vocab + shift, BLOCK, PART, ALIGNMENT)
    for start in range(begin, end, BLOCK):
        for i in tl.static_range(len(columns)):
            tl.store(drow_ptr + start + columns[i], zeros)
    for edge in range(0, edges):
        at = edge_start(edge, end, PART, ALIGNMENT) + columns[0]
        tl.store(drow_ptr + at, zeros, mask=(at >= shift) & (at < vocab + shift))


@triton.jit
def clamp_id(token, n, vocab, first_bad_ptr):
    """The id clamped to the vocabulary; flags ``n`` if it was outside."""
    if (token < 0) | (token >= vocab):
        tl.atomic_min(first_bad_ptr, tl.cast(n, tl.int64))
    return tl.minimum(tl.maximum(token, 0), vocab - 1).to(tl.int32)
