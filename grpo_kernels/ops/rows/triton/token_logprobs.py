"""Triton kernels of ``token_logprobs`` and their launchers: persistent programs that take rows in turn."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_kernels.device_values import first_bad
from grpo_kernels.dtypes import accumulation_dtype
from grpo_kernels.ops.rows.calls import GradientCall, StatisticsCall, empty_statistics
from grpo_kernels.ops.rows.triton.launch import (
    STRIDES,
    TOKENS,
    Alignment,
    alignment_of,
    blocks_of,
    check_rows,
    curve_of,
    transform_arguments,
    vector_of,
)
from grpo_kernels.ops.rows.triton.softmax import (
    base_and_log_sum,
    block_columns,
    clamp_id,
    gradient_weights,
    load_columns,
    row_gradient,
    row_results,
    row_shift,
    row_statistics,
    token_gradient,
    transform,
    zero_row,
)
from grpo_kernels.ops.tokens.triton.elementary import log2
from grpo_kernels.ops.tokens.triton.launch import arithmetic, as_bytes, check_tokens, rounded, row_strides

_ID_BLOCK = 1024
_STATISTICS = ["logprobs_ptr", "lse_ptr", "entropy_ptr"]
_UPSTREAM = ["dlogprobs_ptr", "dentropy_ptr"]
_EXTRAS = ["log_sum_squares_ptr", "mean_logits_ptr", "is_top1_ptr"]


@triton.jit(do_not_specialize=[*STRIDES, *TOKENS, *_STATISTICS, *_EXTRAS, "rows", "length"])
def _token_logprobs_fwd_kernel(
    logits_ptr,  # [B, T or T + 1, V]
    batch_stride: tl.int64,
    row_stride: tl.int64,
    ids_ptr,  # [B, T]
    mask_ptr,  # [B, T] or None
    logprobs_ptr,
    lse_ptr,
    entropy_ptr,
    log_sum_squares_ptr,  # may be None, like the next two
    mean_logits_ptr,
    is_top1_ptr,
    first_bad_ptr,  # [4]
    rows,
    length,
    vocab,
    inner: tl.float64,
    rate: tl.float64,
    CURVE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ACC: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
):
    columns = block_columns(LANES, UNROLL, VECTOR)
    inner_ = tl.full([], inner, ACC)
    wide_rate = tl.full([], rate, tl.float64)
    rate_ = wide_rate.to(ACC)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        n = tl.cast(row, tl.int32)
        unmasked = n >= 0
        if mask_ptr is not None:
            unmasked = tl.load(mask_ptr + n) != 0
        logprob = tl.full([], 0.0, ACC)
        entropy = tl.full([], 0.0, ACC)
        lse = tl.full([], 0.0, tl.float64)
        squares = tl.full([], 0.0, ACC)
        mean = tl.full([], 0.0, ACC)
        is_first = n < 0
        if unmasked:
            token = clamp_id(tl.load(ids_ptr + n), n, vocab, first_bad_ptr)
            start, shift = row_shift(row // length, row % length, batch_stride, row_stride, ALIGNMENT, VECTOR)
            row_ptr = logits_ptr + start
            target = transform(tl.load(row_ptr + shift + token).to(ACC), inner_, CURVE)
            base, row_sum, weighted = row_statistics(
                row_ptr, columns, shift, vocab, inner_, rate_, CURVE, ALIGNMENT, ACC
            )
            logprob, entropy, lse = row_results(base, row_sum, weighted, target, wide_rate, ACC)
            if log_sum_squares_ptr is not None or mean_logits_ptr is not None or is_top1_ptr is not None:
                squares, total, rank = _row_extras(
                    row_ptr, columns, shift, vocab, token, target, base, inner_, rate_, CURVE, ACC
                )
                squares = ((log2(squares) - 2.0 * log2(row_sum)) * 0.6931471805599453).to(ACC)
                mean = total / vocab * (wide_rate * 0.6931471805599453).to(ACC)
                is_first = rank == 0
        tl.store(logprobs_ptr + n, logprob)
        tl.store(lse_ptr + n, lse)
        tl.store(entropy_ptr + n, entropy)
        if log_sum_squares_ptr is not None:
            tl.store(log_sum_squares_ptr + n, squares)
        if mean_logits_ptr is not None:
            tl.store(mean_logits_ptr + n, mean)
        if is_top1_ptr is not None:
            tl.store(is_top1_ptr + n, is_first.to(tl.uint8))


@triton.jit
def _row_extras(
    row_ptr,  # ``shift`` elements before the row
    columns,
    shift,
    vocab,
    token,
    target,
    base,
    inner,
    rate,
    CURVE: tl.constexpr,
    ACC: tl.constexpr,
):
    """``sum 4^t``, ``sum v``, and the token's rank by larger logit and then by smaller index."""
    LANES: tl.constexpr = columns[0].shape[0]
    BLOCK: tl.constexpr = columns[0].numel * len(columns)
    squares = tl.zeros([LANES], ACC)
    total = tl.zeros([LANES], ACC)
    rank = tl.zeros([LANES], tl.int32)
    for start in range(0, vocab + shift, BLOCK):
        block = [load_columns(row_ptr, start + at, shift, vocab, inner, float("-inf"), CURVE, ACC) for at in columns]
        for i in tl.static_range(len(columns)):
            v = block[i]
            column = start + columns[i] - shift
            inside = (column >= 0) & (column < vocab)
            squares += tl.sum(tl.exp2((v - base) * (2.0 * rate)), 1)
            total += tl.sum(tl.where(inside, v, 0.0), 1)
            rank += tl.sum((inside & ((v > target) | ((v == target) & (column < token)))).to(tl.int32), 1)
    return tl.sum(squares, 0), tl.sum(total, 0), tl.sum(rank, 0)


@triton.jit(do_not_specialize=["ids_ptr", "mask_ptr", "count", "vocab"])
def _clamp_ids_kernel(ids_ptr, mask_ptr, clamped_ptr, first_bad_ptr, count, vocab, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    unmasked = n < count
    if mask_ptr is not None:
        unmasked = tl.load(mask_ptr + n, mask=unmasked, other=0) != 0
    ids = tl.load(ids_ptr + n, mask=unmasked, other=0)
    is_bad = (ids < 0) | (ids >= vocab)
    tl.atomic_min(first_bad_ptr + tl.zeros_like(n), n.to(tl.int64), mask=is_bad)
    tl.store(clamped_ptr + n, tl.minimum(tl.maximum(ids, 0), vocab - 1), mask=n < count)


def clamp_ids(ids: Tensor, mask: Tensor | None, vocab: int) -> Tensor:  # [N] -> [N]
    """Clamps ids to the vocabulary, and flags the first one outside it.

    For losses that run in chunks, whose row kernels would flag an index within their chunk.
    """
    clamped, count = torch.empty_like(ids), ids.shape[0]
    check_tokens(count, torch.int64, ids=ids)
    check_tokens(count, torch.bool, mask=mask)
    if count:
        grid = (triton.cdiv(count, _ID_BLOCK),)
        _clamp_ids_kernel[grid](ids, as_bytes(mask), clamped, first_bad(ids.device), count, vocab, BLOCK=_ID_BLOCK)
    return clamped


def token_logprobs_fwd(logits: Tensor, call: StatisticsCall) -> tuple[Tensor, ...]:  # [B, T or T + 1, V]
    """The registered op."""
    ids, mask, outputs = call.ids, call.mask, call.outputs
    check_rows(logits, ids)
    check_tokens(ids.numel(), torch.bool, mask=mask)
    statistics = empty_statistics(logits, ids.shape, outputs)
    if ids.numel() == 0:
        return statistics
    logprobs, lse, entropy, *extras = statistics
    log_sum_squares, mean_logits, is_top1 = (x if outputs >> bit & 1 else None for bit, x in enumerate(extras, 1))
    strides, vocab, vector = row_strides(logits), logits.shape[-1], vector_of(logits.dtype)
    alignment = alignment_of(vector, strides)
    is_plain = alignment == Alignment.ALIGNED and vocab % vector == 0 and outputs <= 1
    blocks = blocks_of("statistics", vocab, logits.element_size(), logits.device)
    grid, sizes = blocks.launch(ids.numel(), vector, logits.device, is_plain)
    inner, rate, _ = transform_arguments(call.transform)
    _token_logprobs_fwd_kernel[grid](
        logits,
        *strides,
        ids,
        as_bytes(mask),
        logprobs,
        lse,
        entropy,
        log_sum_squares,
        mean_logits,
        as_bytes(is_top1),
        first_bad(ids.device),
        ids.numel(),
        ids.shape[1],
        vocab,
        inner,
        rate,
        CURVE=curve_of(call.transform),
        ALIGNMENT=alignment,
        ACC=arithmetic(logits.dtype),
        **sizes,
    )
    return statistics


@triton.jit(do_not_specialize=[*STRIDES, *TOKENS, *_STATISTICS, *_UPSTREAM, "rows", "rows_per_batch", "length"])
def _token_logprobs_bwd_kernel(
    logits_ptr,  # [B, T or T + 1, V]
    batch_stride: tl.int64,
    row_stride: tl.int64,
    dlogits_ptr,  # like logits; may be logits itself
    dbatch_stride: tl.int64,
    drow_stride: tl.int64,
    ids_ptr,  # [B, T], like all that follow
    mask_ptr,  # or None
    logprobs_ptr,
    lse_ptr,
    entropy_ptr,
    dlogprobs_ptr,  # or None
    dentropy_ptr,  # or None
    first_bad_ptr,  # [4]
    rows,
    rows_per_batch,
    length,
    vocab,
    inner: tl.float64,
    rate: tl.float64,
    slope: tl.float64,
    CURVE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ACC: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
):
    columns = block_columns(LANES, UNROLL, VECTOR)
    inner_ = tl.full([], inner, ACC)
    wide_rate = tl.full([], rate, tl.float64)
    rate_ = wide_rate.to(ACC)
    slope_ = tl.full([], slope, ACC)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        b = row // rows_per_batch
        t = row % rows_per_batch
        n = b * length + t
        live = t < length
        if mask_ptr is not None:
            live = live & (tl.load(mask_ptr + n, mask=live, other=0) != 0)
        c = tl.full([], 0.0, ACC)
        c_h = tl.full([], 0.0, ACC)
        if dlogprobs_ptr is not None:
            c = tl.load(dlogprobs_ptr + n, mask=live, other=0.0)
        if dentropy_ptr is not None:
            c_h = tl.load(dentropy_ptr + n, mask=live, other=0.0)
        dstart, dshift = row_shift(b, t, dbatch_stride, drow_stride, ALIGNMENT, VECTOR)
        drow_ptr = dlogits_ptr + dstart
        if (c != 0) | (c_h != 0):
            token = clamp_id(tl.load(ids_ptr + n), n, vocab, first_bad_ptr)
            start, shift = row_shift(b, t, batch_stride, row_stride, ALIGNMENT, VECTOR)
            row_ptr = logits_ptr + start
            target = transform(tl.load(row_ptr + shift + token).to(ACC), inner_, CURVE)
            tl.debug_barrier()  # every thread has read the token's logit before any overwrites it
            entropy = tl.load(entropy_ptr + n)
            base, log_sum = base_and_log_sum(tl.load(lse_ptr + n), wide_rate, ACC)
            w, w_t = gradient_weights(log_sum, entropy, c, c_h, slope_, dentropy_ptr is not None)
            row_gradient(
                row_ptr, drow_ptr, columns, shift, vocab, base, w, w_t, inner_, rate_,
                dentropy_ptr is not None, CURVE, ALIGNMENT, ACC,
            )  # fmt: skip
            dtarget = token_gradient(target, tl.load(logprobs_ptr + n), entropy, c, c_h, slope_, CURVE)
            tl.debug_barrier()  # then overwrite what another thread wrote there
            tl.store(drow_ptr + dshift + token, dtarget.to(dlogits_ptr.dtype.element_ty))
        else:
            zero_row(drow_ptr, columns, dshift, vocab, ALIGNMENT)


def token_logprobs_bwd(logits: Tensor, call: GradientCall, dlogits: Tensor) -> None:  # [B, T or T + 1, V], like logits
    """The registered op."""
    ids, mask, dlogprobs, dentropy = call.ids, call.mask, call.dlogprobs, call.dentropy
    logprobs, lse, entropy = call.logprobs, call.lse, call.entropy
    check_rows(logits, ids, dlogits)
    check_tokens(ids.numel(), torch.bool, mask=mask)
    check_tokens(ids.numel(), torch.float64, lse=lse)
    values = {"logprobs": logprobs, "entropy": entropy, "dlogprobs": dlogprobs, "dentropy": dentropy}
    check_tokens(ids.numel(), accumulation_dtype(logits.dtype), **values)
    rows, vocab, vector = logits.shape[0] * logits.shape[1], logits.shape[-1], vector_of(logits.dtype)
    if rows == 0:
        return
    blocks = blocks_of("gradient", vocab, logits.element_size(), logits.device)
    with rounded(dlogits) as out:
        strides, dstrides = row_strides(logits), row_strides(out)
        alignment = alignment_of(vector, strides, dstrides)
        is_plain = alignment == Alignment.ALIGNED and vocab % vector == 0
        grid, sizes = blocks.launch(rows, vector, logits.device, is_plain)
        _token_logprobs_bwd_kernel[grid](
            logits,
            *strides,
            out,
            *dstrides,
            ids,
            as_bytes(mask),
            logprobs,
            lse,
            entropy,
            dlogprobs,
            dentropy,
            first_bad(ids.device),
            rows,
            logits.shape[1],
            ids.shape[1],
            vocab,
            *transform_arguments(call.transform),
            CURVE=curve_of(call.transform),
            ALIGNMENT=alignment,
            ACC=arithmetic(logits.dtype),
            **sizes,
        )
