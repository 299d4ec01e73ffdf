"""Triton kernels of ``grpo_loss`` and their launcher: a row's statistics, coefficient and gradient in one program."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_kernels.config import Option
from grpo_kernels.ops.policy_loss.triton_kernels import policy_arguments, policy_variant
from grpo_kernels.ops.policy_loss.triton_math import token_loss
from grpo_kernels.ops.token_logprobs.op import accumulation_dtype
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


@triton.jit(
    do_not_specialize=["batch_stride", "row_stride", "dbatch_stride", "drow_stride", "rows_per_batch", "length"]
)
def _grpo_loss_kernel(
    logits_ptr,  # [B, T or T + 1, V]
    batch_stride,
    row_stride,
    dlogits_ptr,  # like logits, which it may be; or None
    dbatch_stride,
    drow_stride,
    ids_ptr,  # [B, T], like all that follow
    mask_ptr,
    advantages_ptr,
    policy_weights_ptr,
    kl_weights_ptr,
    entropy_weights_ptr,  # or None, like the next two
    old_logprobs_ptr,
    ref_logprobs_ptr,
    logprobs_ptr,
    entropy_ptr,
    live_ptr,
    rows_per_batch,
    length,
    vocab,
    inner: tl.float64,
    outer: tl.float64,
    slope: tl.float64,
    ratio_low: tl.float64,
    ratio_high: tl.float64,
    delta: tl.float64,
    beta: tl.float64,
    BIAS_CORRECTED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    b, t = row // rows_per_batch, row % rows_per_batch
    n = b * length + t
    inside = t < length
    unmasked = tl.load(mask_ptr + n, mask=inside, other=0) != 0
    c = tl.full([], 0.0, ACC)
    c_h = tl.full([], 0.0, ACC)
    logprob = tl.full([], 0.0, ACC)
    entropy = tl.full([], 0.0, ACC)
    lse = tl.full([], 0.0, tl.float64)
    token = tl.load(ids_ptr + n, mask=unmasked, other=0)
    token = tl.minimum(tl.maximum(token, 0), vocab - 1)  # values are not checked on a GPU; reads stay inside
    row_ptr = logits_ptr + row_offset(b, t, batch_stride, row_stride, ALIGNED)
    if unmasked:
        sign, scale = tl.full([], inner, ACC), tl.full([], outer, ACC)
        row_max, row_sum, weighted = row_statistics(row_ptr, vocab, sign, scale, SOFTCAP, ACC, BLOCK)
        target = transform(tl.load(row_ptr + token).to(ACC), sign, SOFTCAP)
        log_sum = tl.log(row_sum)
        logprob = (target - row_max) * scale - log_sum
        entropy = log_sum - weighted / row_sum
        lse = log_sum_exp(row_max, row_sum, outer)
        if dlogits_ptr is not None:
            old_logprob = logprob  # on-policy 0, or a NaN's NaN
            if old_logprobs_ptr is not None:
                old_logprob = tl.load(old_logprobs_ptr + n)
            log_ratio = logprob - old_logprob
            ref_logprob = logprob
            if ref_logprobs_ptr is not None:
                ref_logprob = tl.load(ref_logprobs_ptr + n)
            _, dlog_ratio, dlogprob, _, _, _ = token_loss(
                logprob,
                log_ratio,
                ref_logprob,
                tl.load(advantages_ptr + n),
                tl.load(policy_weights_ptr + n),
                tl.load(kl_weights_ptr + n),
                tl.full([], ratio_low, ACC),
                tl.full([], ratio_high, ACC),
                tl.full([], delta, ACC),
                tl.full([], beta, ACC),
                ref_logprobs_ptr is not None,
                BIAS_CORRECTED,
            )
            c = dlog_ratio + dlogprob
            if entropy_weights_ptr is not None:
                c_h = -tl.load(entropy_weights_ptr + n)
    is_live = (c != 0) | (c_h != 0)
    tl.store(logprobs_ptr + n, logprob, mask=inside)
    tl.store(entropy_ptr + n, entropy, mask=inside)
    tl.store(live_ptr + n, is_live.to(tl.uint8), mask=inside)
    if dlogits_ptr is not None:
        drow_ptr = dlogits_ptr + row_offset(b, t, dbatch_stride, drow_stride, ALIGNED)
        if is_live:
            row_gradient(
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
                entropy_weights_ptr is not None,
                SOFTCAP,
                ACC,
                BLOCK,
            )
        else:
            zero_row(drow_ptr, vocab, BLOCK)


@triton.jit(do_not_specialize=["row_stride", "rows"])
def _pack_kernel(values_ptr, row_stride, live_ptr, rows, width, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Moves live rows up against each other, in their order; one program a block of columns.

    A program takes its rows in turn, and each moves up or stays: nothing is overwritten that is still to be moved, and
    what one program writes no other reads.
    """
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    filled = tl.zeros([], tl.int64)
    for n in range(0, rows):
        if tl.load(live_ptr + n) != 0:
            row = tl.zeros([], tl.int64) + n
            if filled != row:
                values = tl.load(values_ptr + row_offset(0, row, 0, row_stride, ALIGNED) + columns, mask=inside)
                tl.store(values_ptr + row_offset(0, filled, 0, row_stride, ALIGNED) + columns, values, mask=inside)
                tl.debug_barrier()
            filled += 1


def grpo_loss_fwd(
    logits: Tensor,  # [B, T or T + 1, V]
    ids: Tensor,  # [B, T]
    mask: Tensor,
    advantages: Tensor,
    policy_weights: Tensor,
    kl_weights: Tensor,
    entropy_weights: Tensor | None,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    options: list[int],
    params: list[float],
    temperature: float,
    softcap: float,
    logit_scale: float,
    dlogits: Tensor | None,  # like logits
    pack: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The registered op."""
    if options[Option.SEQUENCE_LEVEL]:
        raise ValueError("options must be token-local: a sequence-level ratio needs every token's statistics first")
    variant = policy_variant(options)
    dtype = accumulation_dtype(logits.dtype)
    logprobs, entropy = (torch.empty_like(ids, dtype=dtype) for _ in range(2))
    live = torch.empty_like(ids, dtype=torch.bool)
    rows, vocab = logits.shape[0] * logits.shape[1], logits.shape[-1]
    if rows == 0:
        return logprobs, entropy, live
    with nullcontext() if dlogits is None else rounded(dlogits) as out:
        strides = (*row_strides(logits), *((0, 0) if out is None else row_strides(out)))
        shared = {"ALIGNED": are_aligned(*strides), **block_options(vocab)}
        _grpo_loss_kernel[(rows,)](
            logits,
            *strides[:2],
            out,
            *strides[2:],
            ids,
            as_bytes(mask),
            advantages,
            policy_weights,
            kl_weights,
            entropy_weights,
            old_logprobs,
            ref_logprobs,
            logprobs,
            entropy,
            as_bytes(live),
            logits.shape[1],
            ids.shape[1],
            vocab,
            *transform_arguments(temperature, softcap, logit_scale),
            *policy_arguments(params),
            **variant,
            SOFTCAP=softcap > 0,
            ACC=arithmetic(logits.dtype),
            **shared,
        )
        if pack and out is not None:
            blocks = triton.cdiv(vocab, shared["BLOCK"])
            _pack_kernel[(blocks,)](out, strides[3], as_bytes(live), rows, vocab, **shared)
    return logprobs, entropy, live
