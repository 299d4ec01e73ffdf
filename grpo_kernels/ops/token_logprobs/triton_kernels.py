"""Triton kernels of ``token_logprobs`` and their launchers: one program a row, any vocabulary, any block."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from grpo_kernels.ops.token_logprobs.op import empty_statistics
from grpo_kernels.ops.token_logprobs.triton_math import (
    log_sum_exp,
    row_gradient,
    row_offset,
    row_statistics,
    transform,
    zero_row,
)
from grpo_kernels.ops.token_logprobs.triton_rows import (
    are_aligned,
    arithmetic,
    as_bytes,
    block_options,
    rounded,
    row_strides,
    transform_arguments,
)


@triton.jit(do_not_specialize=["batch_stride", "row_stride", "length"])
def _token_logprobs_fwd_kernel(
    logits_ptr,  # [B, T or T + 1, V]
    batch_stride,
    row_stride,
    ids_ptr,  # [B, T]
    mask_ptr,  # [B, T] or None
    logprobs_ptr,
    lse_ptr,
    entropy_ptr,
    log_sum_squares_ptr,  # or None, like the next two
    mean_logits_ptr,
    is_top1_ptr,
    length,
    vocab,
    inner: tl.float64,
    outer: tl.float64,
    SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    if mask_ptr is not None:  # noqa: SIM102  decided when the kernel is compiled, unlike the next
        if tl.load(mask_ptr + n) == 0:
            tl.store(logprobs_ptr + n, 0.0)
            tl.store(lse_ptr + n, 0.0)
            tl.store(entropy_ptr + n, 0.0)
            if log_sum_squares_ptr is not None:
                tl.store(log_sum_squares_ptr + n, 0.0)
            if mean_logits_ptr is not None:
                tl.store(mean_logits_ptr + n, 0.0)
            if is_top1_ptr is not None:
                tl.store(is_top1_ptr + n, 0)
            return
    row_ptr = logits_ptr + row_offset(n // length, n % length, batch_stride, row_stride, ALIGNED)
    sign, scale = tl.full([], inner, ACC), tl.full([], outer, ACC)
    row_max, row_sum, weighted = row_statistics(row_ptr, vocab, sign, scale, SOFTCAP, ACC, BLOCK)
    token = tl.load(ids_ptr + n)
    token = tl.minimum(tl.maximum(token, 0), vocab - 1)  # values are not checked on a GPU; reads stay inside
    target = transform(tl.load(row_ptr + token).to(ACC), sign, SOFTCAP)
    log_sum = tl.log(row_sum)
    tl.store(logprobs_ptr + n, (target - row_max) * scale - log_sum)
    tl.store(lse_ptr + n, log_sum_exp(row_max, row_sum, outer))
    tl.store(entropy_ptr + n, log_sum - weighted / row_sum)
    if log_sum_squares_ptr is not None or mean_logits_ptr is not None or is_top1_ptr is not None:
        columns = tl.arange(0, BLOCK)
        squares = tl.zeros([BLOCK], ACC)
        total = tl.zeros([BLOCK], ACC)
        before = tl.zeros([BLOCK], tl.int32)  # columns before the token that are as large
        for start in range(0, vocab, BLOCK):
            inside = start + columns < vocab
            z = tl.load(row_ptr + start + columns, mask=inside, other=0.0).to(ACC)
            v = transform(z, sign, SOFTCAP)
            total += tl.where(inside, v, 0.0)
            squares += tl.where(inside, tl.exp(2.0 * ((v - row_max) * scale)), 0.0)
            before += (inside & (start + columns < token) & (v >= target)).to(tl.int32)
        if log_sum_squares_ptr is not None:
            tl.store(log_sum_squares_ptr + n, tl.log(tl.sum(squares, 0)) - 2.0 * log_sum)
        if mean_logits_ptr is not None:
            tl.store(mean_logits_ptr + n, tl.sum(total, 0) / vocab * scale)
        if is_top1_ptr is not None:
            tl.store(is_top1_ptr + n, ((target >= row_max) & (tl.sum(before, 0) == 0)).to(tl.uint8))


def token_logprobs_fwd(
    logits: Tensor,  # [B, T or T + 1, V]
    ids: Tensor,  # [B, T]
    mask: Tensor | None,  # [B, T]
    temperature: float,
    softcap: float,
    logit_scale: float,
    outputs: int,
) -> tuple[Tensor, ...]:
    """The registered op."""
    statistics = empty_statistics(logits, ids.shape, outputs)
    if ids.numel() == 0:
        return statistics
    logprobs, lse, entropy, *extras = statistics
    log_sum_squares, mean_logits, is_top1 = (x if outputs >> bit & 1 else None for bit, x in enumerate(extras, 1))
    strides = row_strides(logits)
    inner, outer, _ = transform_arguments(temperature, softcap, logit_scale)
    _token_logprobs_fwd_kernel[(ids.numel(),)](
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
        ids.shape[1],
        logits.shape[-1],
        inner,
        outer,
        SOFTCAP=softcap > 0,
        ALIGNED=are_aligned(*strides),
        ACC=arithmetic(logits.dtype),
        **block_options(logits.shape[-1]),
    )
    return statistics


@triton.jit(
    do_not_specialize=["batch_stride", "row_stride", "dbatch_stride", "drow_stride", "rows_per_batch", "length"]
)
def _token_logprobs_bwd_kernel(
    logits_ptr,  # [B, T or T + 1, V]
    batch_stride,
    row_stride,
    dlogits_ptr,  # like logits, which it may be
    dbatch_stride,
    drow_stride,
    ids_ptr,  # [B, T], like all that follow
    mask_ptr,  # or None
    logprobs_ptr,
    lse_ptr,
    entropy_ptr,
    dlogprobs_ptr,  # or None
    dentropy_ptr,  # or None
    rows_per_batch,
    length,
    vocab,
    inner: tl.float64,
    outer: tl.float64,
    slope: tl.float64,
    SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    b, t = row // rows_per_batch, row % rows_per_batch
    n = b * length + t
    drow_ptr = dlogits_ptr + row_offset(b, t, dbatch_stride, drow_stride, ALIGNED)
    live = t < length
    if mask_ptr is not None:
        live = live & (tl.load(mask_ptr + n, mask=live, other=0) != 0)
    c = tl.full([], 0.0, ACC)
    c_h = tl.full([], 0.0, ACC)
    if dlogprobs_ptr is not None:
        c = tl.load(dlogprobs_ptr + n, mask=live, other=0.0)
    if dentropy_ptr is not None:
        c_h = tl.load(dentropy_ptr + n, mask=live, other=0.0)
    if (c != 0) | (c_h != 0):
        token = tl.minimum(tl.maximum(tl.load(ids_ptr + n), 0), vocab - 1)
        row_gradient(
            logits_ptr + row_offset(b, t, batch_stride, row_stride, ALIGNED),
            drow_ptr,
            vocab,
            token,
            tl.load(logprobs_ptr + n),
            tl.load(lse_ptr + n),
            tl.load(entropy_ptr + n),
            c,
            c_h,
            inner,
            outer,
            slope,
            dentropy_ptr is not None,
            SOFTCAP,
            ACC,
            BLOCK,
        )
    else:
        zero_row(drow_ptr, vocab, BLOCK)


def token_logprobs_bwd(
    logits: Tensor,  # [B, T or T + 1, V]
    ids: Tensor,  # [B, T]
    mask: Tensor | None,  # [B, T]
    logprobs: Tensor,
    lse: Tensor,
    entropy: Tensor,
    dlogprobs: Tensor | None,
    dentropy: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    dlogits: Tensor,  # like logits
) -> None:
    """The registered op."""
    rows = logits.shape[0] * logits.shape[1]
    if rows == 0:
        return
    with rounded(dlogits) as out:
        strides = (*row_strides(logits), *row_strides(out))
        _token_logprobs_bwd_kernel[(rows,)](
            logits,
            *strides[:2],
            out,
            *strides[2:],
            ids,
            as_bytes(mask),
            logprobs,
            lse,
            entropy,
            dlogprobs,
            dentropy,
            logits.shape[1],
            ids.shape[1],
            logits.shape[-1],
            *transform_arguments(temperature, softcap, logit_scale),
            SOFTCAP=softcap > 0,
            ALIGNED=are_aligned(*strides),
            ACC=arithmetic(logits.dtype),
            **block_options(logits.shape[-1]),
        )
