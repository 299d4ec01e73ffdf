"""Triton kernels of ``grpo_loss`` and their launcher: a row's statistics, coefficient and gradient in one program."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_kernels.device_values import first_bad
from grpo_kernels.dtypes import accumulation_dtype
from grpo_kernels.loss.options import Level, Option
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
    block_columns,
    gradient_weights,
    held_inside,
    row_gradient,
    row_results,
    row_shift,
    row_statistics,
    token_gradient,
    transform,
    zero_row,
)
from grpo_kernels.ops.tokens.triton.elementary import log2
from grpo_kernels.ops.tokens.triton.group_advantages import group_advantage
from grpo_kernels.ops.tokens.triton.launch import arithmetic, as_bytes, check_tokens, rounded, row_strides
from grpo_kernels.ops.tokens.triton.policy_loss import policy_arguments, policy_variant
from grpo_kernels.ops.tokens.triton.policy_math import token_loss

_GROUP_BLOCK, _OFFSET_BLOCK = tl.constexpr(64), tl.constexpr(256)
_GIVEN = ["advantages_ptr", "policy_weights_ptr", "kl_weights_ptr", "entropy_weights_ptr", "old_logprobs_ptr",
          "ref_logprobs_ptr", "rewards_ptr", "offsets_ptr"]  # fmt: skip
_MADE = ["logprobs_ptr", "entropy_ptr", "live_ptr"]
_SIZES = ["rows", "rows_per_batch", "length", "sequences", "num_generations"]


@triton.jit
def _peek(mask_ptr, ids_ptr, row, rows, rows_per_batch, length):
    """Which token a row belongs to, whether it is a row of an unmasked one, and its id: for the row that comes next."""
    t = row % rows_per_batch
    inside = (row < rows) & (t < length)
    n = row // rows_per_batch * length + t
    unmasked = tl.load(mask_ptr + n, mask=inside, other=0) != 0
    return unmasked, tl.load(ids_ptr + n, mask=inside, other=0)


@triton.jit
def _completion_of(n, offsets_ptr, sequences, BLOCK: tl.constexpr):
    """The completion that packed token ``n`` belongs to."""
    before = tl.zeros([BLOCK], tl.int32)
    for start in range(1, sequences, BLOCK):
        s = start + tl.arange(0, BLOCK)
        before += ((s < sequences) & (tl.load(offsets_ptr + s, mask=s < sequences, other=0) <= n)).to(tl.int32)
    return tl.sum(before, 0)


@triton.jit(do_not_specialize=[*STRIDES, *TOKENS, *_GIVEN, *_MADE, *_SIZES])
def _grpo_loss_kernel(
    logits_ptr,  # [B, T or T + 1, V]
    batch_stride: tl.int64,
    row_stride: tl.int64,
    dlogits_ptr,  # like logits, which it may be; or None
    dbatch_stride: tl.int64,
    drow_stride: tl.int64,
    ids_ptr,  # [B, T], like all that follow
    mask_ptr,
    advantages_ptr,  # read; written where there are rewards
    policy_weights_ptr,
    kl_weights_ptr,
    entropy_weights_ptr,  # or None, like the next two
    old_logprobs_ptr,
    ref_logprobs_ptr,
    logprobs_ptr,
    entropy_ptr,
    live_ptr,
    rewards_ptr,  # [S] or None
    offsets_ptr,  # [S + 1] where packed, else None
    first_bad_ptr,  # [4]
    rows,
    rows_per_batch,
    length,
    sequences,
    num_generations,
    vocab,
    inner: tl.float64,
    rate: tl.float64,
    slope: tl.float64,
    ratio_low: tl.float64,
    ratio_high: tl.float64,
    delta: tl.float64,
    beta: tl.float64,
    temperature_pos: tl.float64,
    temperature_neg: tl.float64,
    log_ratio_clamp: tl.float64,
    kl_clamp: tl.float64,
    eps: tl.float64,
    IS_SCALED: tl.constexpr,
    SURROGATE: tl.constexpr,
    LEVEL: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    KL_GRADIENT: tl.constexpr,
    BIAS_CORRECTED: tl.constexpr,
    IS_NARROWED: tl.constexpr,
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
    unmasked, next_id = _peek(mask_ptr, ids_ptr, tl.program_id(0), rows, rows_per_batch, length)
    advantage = tl.full([], 0.0, ACC)
    completion_end = tl.full([], 0, tl.int32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        b = row // rows_per_batch
        t = row % rows_per_batch
        n = b * length + t
        inside = t < length
        is_row, given_id = unmasked, next_id
        token = tl.full([], 0, tl.int32)
        unmasked, next_id = _peek(mask_ptr, ids_ptr, row + tl.num_programs(0), rows, rows_per_batch, length)
        c = tl.full([], 0.0, ACC)
        c_h = tl.full([], 0.0, ACC)
        logprob = tl.full([], 0.0, ACC)
        entropy = tl.full([], 0.0, ACC)
        own = tl.full([], 0.0, ACC)
        base = tl.full([], 0.0, ACC)
        row_sum = tl.full([], 1.0, ACC)
        start, shift = row_shift(b, t, batch_stride, row_stride, ALIGNMENT, VECTOR)
        row_ptr = logits_ptr + start
        if rewards_ptr is not None:
            if inside & (n >= completion_end):  # the program's first row of a completion
                s = b
                completion_end = (b + 1) * length
                if offsets_ptr is not None:
                    s = _completion_of(n, offsets_ptr, sequences, _OFFSET_BLOCK)
                    completion_end = tl.load(offsets_ptr + s + 1).to(tl.int32)
                eps_ = tl.full([], eps, tl.float64)
                advantage = group_advantage(
                    rewards_ptr, s, num_generations, eps_, first_bad_ptr, IS_SCALED, _GROUP_BLOCK
                ).to(ACC)
            tl.store(advantages_ptr + n, advantage, mask=inside)
        elif advantages_ptr is not None:
            advantage = tl.load(advantages_ptr + n, mask=inside, other=0.0)
        if is_row:
            token = held_inside(given_id, n, vocab, first_bad_ptr)
            target = transform(tl.load(row_ptr + shift + token).to(ACC), inner_, CURVE)
            if dlogits_ptr is not None:  # read now, to be there when the statistics are
                policy_weight = tl.load(policy_weights_ptr + n)
                kl_weight = tl.load(kl_weights_ptr + n)
                old_logprob = tl.load(old_logprobs_ptr + n) if old_logprobs_ptr is not None else target
                ref_logprob = tl.load(ref_logprobs_ptr + n) if ref_logprobs_ptr is not None else target
                if entropy_weights_ptr is not None:
                    c_h = -tl.load(entropy_weights_ptr + n)
            base, row_sum, weighted = row_statistics(
                row_ptr, columns, shift, vocab, inner_, rate_, CURVE, ALIGNMENT, ACC
            )
            logprob, entropy, _ = row_results(base, row_sum, weighted, target, wide_rate, ACC)
            if dlogits_ptr is not None:
                if old_logprobs_ptr is None:
                    old_logprob = logprob  # on-policy 0, or a NaN's NaN
                _, dlog_ratio, dlogprob, _, _, _ = token_loss(
                    logprob,
                    logprob - old_logprob,
                    logprob == logprob,
                    old_logprob,
                    ref_logprob,
                    advantage,
                    policy_weight,
                    kl_weight,
                    tl.full([], ratio_low, ACC),
                    tl.full([], ratio_high, ACC),
                    tl.full([], delta, ACC),
                    tl.full([], beta, ACC),
                    tl.full([], temperature_pos, ACC),
                    tl.full([], temperature_neg, ACC),
                    tl.full([], log_ratio_clamp, ACC),
                    tl.full([], kl_clamp, ACC),
                    ref_logprobs_ptr is not None,
                    SURROGATE,
                    LEVEL,
                    KL_ESTIMATOR,
                    KL_GRADIENT,
                    BIAS_CORRECTED,
                )
                c = dlog_ratio + dlogprob
                own = token_gradient(target, logprob, entropy, c, c_h, slope_, CURVE)
        is_live = (c != 0) | (c_h != 0)
        tl.store(logprobs_ptr + n, logprob, mask=inside)
        tl.store(entropy_ptr + n, entropy, mask=inside)
        tl.store(live_ptr + n, is_live.to(tl.uint8), mask=inside)
        if dlogits_ptr is not None:
            dstart, dshift = row_shift(b, t, dbatch_stride, drow_stride, ALIGNMENT, VECTOR)
            drow_ptr = dlogits_ptr + dstart
            if is_live:
                log_sum = log2(row_sum).to(ACC)
                w, w_t = gradient_weights(log_sum, entropy, c, c_h, slope_, entropy_weights_ptr is not None)
                row_gradient(
                    row_ptr, drow_ptr, columns, shift, vocab, base, w, w_t, inner_, rate_,
                    entropy_weights_ptr is not None, IS_NARROWED, CURVE, ALIGNMENT, ACC,
                )  # fmt: skip
                tl.debug_barrier()  # written last, over what another thread wrote
                tl.store(drow_ptr + dshift + token, own.to(dlogits_ptr.dtype.element_ty))
            else:
                zero_row(drow_ptr, columns, dshift, vocab, ALIGNMENT)


def grpo_loss_fwd(
    logits: Tensor,  # [B, T or T + 1, V]
    ids: Tensor,  # [B, T]
    mask: Tensor,
    advantages: Tensor | None,
    policy_weights: Tensor,
    kl_weights: Tensor,
    entropy_weights: Tensor | None,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    rewards: Tensor | None,  # [S]
    offsets: Tensor | None,  # [S + 1]
    num_generations: int,
    is_scaled: bool,
    eps: float,
    options: list[int],
    params: list[float],
    temperature: float,
    softcap: float,
    logit_scale: float,
    dlogits: Tensor | None,  # like logits
) -> tuple[Tensor, ...]:
    """The registered op."""
    dtype = accumulation_dtype(logits.dtype)
    check_rows(logits, ids, dlogits)
    check_tokens(ids.numel(), torch.bool, mask=mask)
    check_tokens(ids.numel(), dtype, advantages=advantages, policy_weights=policy_weights, kl_weights=kl_weights)
    given = {"entropy_weights": entropy_weights, "old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs}
    check_tokens(ids.numel(), dtype, **given)
    if (advantages is None) == (rewards is None):
        raise ValueError("advantages or rewards must be given, and not both")
    if rewards is not None:
        sequences = ids.shape[0] if offsets is None else offsets.shape[0] - 1
        check_tokens(sequences, dtype, rewards=rewards)
        check_tokens(sequences + 1, torch.int64, offsets=offsets)
    variant = policy_variant(options)
    if options[Option.LEVEL] != Level.TOKEN:
        raise ValueError("options must be token-local: a sequence-level ratio needs every token's statistics first")
    logprobs, entropy = (torch.empty_like(ids, dtype=dtype) for _ in range(2))
    live = torch.empty_like(ids, dtype=torch.bool)
    made = ids.new_empty(0 if rewards is None else ids.numel(), dtype=dtype)
    rows, vocab, vector = logits.shape[0] * logits.shape[1], logits.shape[-1], vector_of(logits.dtype)
    if rows == 0:
        return logprobs, entropy, live, made
    kernel = "statistics" if dlogits is None else "loss"
    blocks = blocks_of(kernel, vocab, logits.element_size(), logits.device)
    with nullcontext() if dlogits is None else rounded(dlogits) as out:
        strides = row_strides(logits)
        dstrides = strides if out is None else row_strides(out)
        is_narrowed = out is not None and out.element_size() < logits.element_size()
        alignment = alignment_of(vector, strides, dstrides, is_narrowed)
        is_plain = alignment == Alignment.ALIGNED and vocab % vector == 0 and rewards is None
        grid, sizes = blocks.launch(rows, vector, logits.device, is_plain)
        _grpo_loss_kernel[grid](
            logits,
            *strides,
            out,
            *dstrides,
            ids,
            as_bytes(mask),
            advantages if rewards is None else made,
            policy_weights,
            kl_weights,
            entropy_weights,
            old_logprobs,
            ref_logprobs,
            logprobs,
            entropy,
            as_bytes(live),
            rewards,
            offsets,
            first_bad(ids.device),
            rows,
            logits.shape[1],
            ids.shape[1],
            0 if rewards is None else rewards.shape[0],
            num_generations,
            vocab,
            *transform_arguments(temperature, softcap, logit_scale),
            *policy_arguments(params),
            eps,
            IS_SCALED=is_scaled,
            **variant,
            IS_NARROWED=is_narrowed,
            CURVE=curve_of(softcap, logit_scale),
            ALIGNMENT=alignment,
            ACC=arithmetic(logits.dtype),
            **sizes,
        )
    return logprobs, entropy, live, made
