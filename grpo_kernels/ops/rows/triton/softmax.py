"""Rows of logits as Triton device functions: addresses, online softmax, gradient. The only Triton copy.

A row is taken in powers of two. With ``y = outer v(z)``, ``v`` being ``z`` or ``tanh(inner z)``, the exponent of
an element is ``t = (v - base) rate`` for ``rate = outer log2 e``. The difference comes first: what all logits have
in common costs no digits then, and the largest has exponent 0 exactly. Kernels take ``inner``, ``rate`` and ``slope``
in fp64, for fp64 logits, and bring them to the arithmetic's type by ``tl.full([], x, ACC)``.

A block is a tuple of UNROLL parts, tensors ``[LANES, VECTOR]``: a lane is a thread, a vector one load of 16 bytes. A
thread loads all its vectors of a block before it uses one. The online state is kept per lane, so that the loop over a
row needs no reduction across threads, and one rescaling serves UNROLL * VECTOR elements. UNROLL is no dimension of a
tensor, for releases of Triton differ in whether such a dimension lies across threads: with ``[UNROLL, LANES, VECTOR]``
3.6 exchanged maxima and sums between threads in every block. What does not fill a block, a row's edges, goes by parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from grpo_kernels.ops.tokens.triton.elementary import expm1, log2, tanh

#: What ``v`` is; in the order of launch.Curve.
_SOFTCAP = tl.constexpr(1)
#: How rows lie; in the order of launch.Alignment.
_SHIFTED, _LOOSE = tl.constexpr(1), tl.constexpr(2)
#: An exponent with the same power (0) as -inf, whose product with 0 is not NaN.
_FLOOR = tl.constexpr(-1e4)
#: fp32's least number: a base where all is -inf.
_LOWEST = tl.constexpr(-3.4028234663852886e38)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def transform(z, inner, CURVE: tl.constexpr):
    """``v``, of logits in the arithmetic's type."""
    if CURVE == _SOFTCAP:
        return tanh(z * inner)
    return z


@triton.jit
def row_shift(b, t, batch_stride, row_stride, ALIGNMENT: tl.constexpr, VECTOR: tl.constexpr):
    """Where row ``t`` of completion ``b`` begins, at a multiple of VECTOR, and how many elements further it does.

    No early return: what follows one is still compiled, and ``multiple_of`` there would hold for every alignment.
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
    """The columns of a block, part by part; those of a thread's vector are next to each other."""
    first = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    columns = ()
    for i in tl.static_range(UNROLL):
        columns += (first + i * LANES * VECTOR,)
    return columns


@triton.jit
def row_edges(extent, BLOCK: tl.constexpr, PART: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Where a row's whole blocks begin and end, and how many parts hold the rest of it, its edges."""
    begin = PART if ALIGNMENT == _SHIFTED else 0  # a row may begin within its first part
    end = begin + tl.maximum(extent - begin, 0) // BLOCK * BLOCK
    return begin, end, tl.cdiv(tl.maximum(extent - end, 0), PART) + begin // PART


@triton.jit
def edge_start(edge, end, PART: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Where an edge begins: the first of a shifted row with the row, all others after its whole blocks."""
    if ALIGNMENT == _SHIFTED:
        return 0 if edge == 0 else end + (edge - 1) * PART
    else:
        return end + edge * PART


@triton.jit
def over_block(values):
    """Sum over a lane's elements of a block."""
    total = tl.sum(values[0], 1)
    for i in tl.static_range(1, len(values)):
        total += tl.sum(values[i], 1)
    return total


@triton.jit
def add_block(block, lane_max, lane_sum, lane_weighted, rate):
    """The state of lanes with a block of ``v`` added."""
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
        e = tl.exp2(t)  # a NaN stays one; -inf is 0
        powers += (e,)
        weighted += (tl.maximum(t, _FLOOR) * e,)
    lane_weighted = (lane_weighted + shift * lane_sum) * factor + over_block(weighted)
    return largest, lane_sum * factor + over_block(powers), lane_weighted


@triton.jit
def load_columns(row_ptr, columns, shift, vocab, inner, fill, CURVE: tl.constexpr, ACC: tl.constexpr):
    """``v`` of columns counted from ``shift`` before the row; ``fill`` where there is none."""
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
    """``base``, ``sum 2^t`` and ``sum t 2^t`` in one read of the row. NaN is no maximum, and reaches the sums."""
    LANES: tl.constexpr = columns[0].shape[0]
    PART: tl.constexpr = columns[0].numel
    BLOCK: tl.constexpr = PART * len(columns)
    lane_max = tl.full([LANES], float("-inf"), ACC)
    lane_sum = tl.zeros([LANES], ACC)
    lane_weighted = tl.zeros([LANES], ACC)
    begin, end, edges = row_edges(vocab + shift, BLOCK, PART, ALIGNMENT)
    block_ptr = row_ptr + begin
    for _ in tl.range(begin, end, BLOCK, loop_unroll_factor=2):  # the loads of both come first
        z = [tl.load(block_ptr + at) for at in columns]
        block_ptr += BLOCK
        v = [transform(x.to(ACC), inner, CURVE) for x in z]
        lane_max, lane_sum, lane_weighted = add_block(v, lane_max, lane_sum, lane_weighted, rate)
    for edge in range(0, edges):
        at = edge_start(edge, end, PART, ALIGNMENT) + columns[0]
        v = load_columns(row_ptr, at, shift, vocab, inner, float("-inf"), CURVE, ACC)
        lane_max, lane_sum, lane_weighted = add_block((v,), lane_max, lane_sum, lane_weighted, rate)
    base = tl.maximum(tl.max(lane_max, 0), _LOWEST)
    moved = tl.maximum((lane_max - base) * rate, _FLOOR)
    factor = tl.exp2(moved)
    return base, tl.sum(lane_sum * factor, 0), tl.sum((lane_weighted + moved * lane_sum) * factor, 0)


@triton.jit
def row_results(base, row_sum, weighted, target, rate, ACC: tl.constexpr):
    """Log-probability, entropy and, in fp64, log-sum-exp, of a row with its token's ``v``; ``rate`` in fp64.

    A few operations a row: in fp64, so that results are rounded once.
    """
    log_sum = log2(row_sum)
    logprob = (target - base).to(tl.float64) * rate - log_sum
    entropy = log_sum - (weighted / row_sum).to(tl.float64)
    lse = base.to(tl.float64) * rate + log_sum
    return (logprob * _LN2).to(ACC), (entropy * _LN2).to(ACC), lse * _LN2


@triton.jit
def base_of(lse, rate, ACC: tl.constexpr):
    """A base and the log2 of the sum over it, from a log-sum-exp; ``rate`` in fp64."""
    exponent = lse / _LN2
    base = (exponent / tl.where(rate == 0.0, 1.0, rate)).to(ACC)
    return base, (exponent - base.to(tl.float64) * rate).to(ACC)


@triton.jit
def gradient_weights(log_sum, entropy, c, c_h, slope, HAS_ENTROPY: tl.constexpr):
    """``w`` and ``w_t`` of a row's gradient ``2^t (w + w_t t)``, beside its token: of
    ``-p (c + c_H (log p + H)) slope`` with ``log p = (t - log_sum) ln 2``."""
    share = tl.exp2(-log_sum) * slope
    if HAS_ENTROPY:
        return -(c + c_h * (entropy - log_sum * _LN2)) * share, -c_h * _LN2 * share
    return -c * share, tl.zeros_like(c)


@triton.jit
def slope_at(v, slope, CURVE: tl.constexpr):
    """``dy/dz`` where the transform is at ``v``."""
    if CURVE == _SOFTCAP:
        return slope * (1.0 - v * v)
    else:
        return slope


@triton.jit
def token_gradient(target, logprob, entropy, c, c_h, slope, CURVE: tl.constexpr):
    """The gradient of the token's own logit, ``1 - p`` without losing the digits of a p near 1."""
    gradient = -expm1(logprob) * c - c_h * tl.exp(logprob) * (tl.maximum(logprob, _FLOOR) + entropy)
    return gradient * slope_at(target, slope, CURVE)


@triton.jit
def part_gradient(v, base, w, w_t, rate, HAS_ENTROPY: tl.constexpr, CURVE: tl.constexpr):
    """``2^t (w + w_t t)``, and a softcap's slope."""
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
    drow_ptr,  # the same of its gradient, which may lie over the row
    columns,
    shift,
    vocab,
    base,
    w,
    w_t,
    inner,
    rate,
    HAS_ENTROPY: tl.constexpr,
    IS_NARROWED: tl.constexpr,
    CURVE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ACC: tl.constexpr,
):
    """Writes the gradient of every logit as if none were the token's, from the row's end: what the statistics read
    last is the likeliest to be in the cache still.

    IS_NARROWED: the gradient has half the logits' width and lies in the back half of the row's own memory, so that
    threads must not store before all have loaded. Rows are not shifted then: the edge that a row begins with, written
    first, would lie over logits that are still to be read.
    """
    tl.static_assert(not (IS_NARROWED and ALIGNMENT == _SHIFTED), "a narrowed gradient meets shifted rows")
    PART: tl.constexpr = columns[0].numel
    BLOCK: tl.constexpr = PART * len(columns)
    OUT: tl.constexpr = drow_ptr.dtype.element_ty
    begin, end, edges = row_edges(vocab + shift, BLOCK, PART, ALIGNMENT)
    for edge in range(0, edges):
        at = edge_start(edges - 1 - edge, end, PART, ALIGNMENT) + columns[0]
        v = load_columns(row_ptr, at, shift, vocab, inner, 0.0, CURVE, ACC)
        gradient = part_gradient(v, base, w, w_t, rate, HAS_ENTROPY, CURVE)
        if IS_NARROWED:
            tl.debug_barrier()
        inside = (at >= shift) & (at < vocab + shift)
        tl.store(drow_ptr + at, gradient.to(OUT), mask=inside, eviction_policy="evict_first")
    start = end
    for _ in range(begin, end, BLOCK):
        start -= BLOCK
        z = [tl.load(row_ptr + start + at, eviction_policy="evict_first") for at in columns]
        v = [transform(x.to(ACC), inner, CURVE) for x in z]
        gradient = [part_gradient(x, base, w, w_t, rate, HAS_ENTROPY, CURVE).to(OUT) for x in v]
        if IS_NARROWED:
            tl.debug_barrier()
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
    """Writes 0 to a row."""
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
def held_inside(token, n, vocab, first_bad_ptr):
    """An id held inside the vocabulary; the least ``n`` of one that was outside is kept."""
    if (token < 0) | (token >= vocab):
        tl.atomic_min(first_bad_ptr, tl.cast(n, tl.int64))
    return tl.minimum(tl.maximum(token, 0), vocab - 1).to(tl.int32)
