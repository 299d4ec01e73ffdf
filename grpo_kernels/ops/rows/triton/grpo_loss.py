"""The Triton kernel of ``grpo_loss`` and its launcher: a row's statistics, dL/dlogprob and gradient in one program."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_kernels.device_values import first_bad
from grpo_kernels.dtypes import accumulation_dtype
from grpo_kernels.loss.fields import check_fields
from grpo_kernels.loss.options import Level, Option
from grpo_kernels.ops.rows.calls import LossRowsCall
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
    clamp_id,
    gradient_weights,
    row_gradient,
    row_results,
    row_shift,
    row_statistics,
    token_gradient,
    transform,
    zero_row,
)
from grpo_kernels.ops.tokens.triton.elementary import log2
from grpo_kernels.ops.tokens.triton.fields import FIELDS, completion_of, kernel_fields, layout_of, load_field
from grpo_kernels.ops.tokens.triton.group_advantages import write_group_advantages
from grpo_kernels.ops.tokens.triton.launch import arithmetic, as_bytes, check_tokens, rounded, row_strides
from grpo_kernels.ops.tokens.triton.policy_math import encode, loss_variant, token_loss

_RESULTS = ["logprobs_ptr", "entropy_ptr", "live_ptr"]
_SCALARS = ["rewards_ptr", "rows", "rows_per_batch", "length", "sequences", "num_generations", "loss_params"]


@triton.jit
def _load_token(mask_ptr, ids_ptr, row, rows, rows_per_batch, length):
    """Whether a row belongs to an unmasked token, and the token's id. Called one row ahead, to hide the loads."""
    t = row % rows_per_batch
    inside = (row < rows) & (t < length)
    n = row // rows_per_batch * length + t
    unmasked = tl.load(mask_ptr + n, mask=inside, other=0) != 0
    return unmasked, tl.load(ids_ptr + n, mask=inside, other=0)


@triton.jit(do_not_specialize=[*STRIDES, *TOKENS, *FIELDS, *_RESULTS, *_SCALARS])
def _grpo_loss_kernel(
    logits_ptr,  # [B, T or T + 1, V]
    batch_stride: tl.int64,
    row_stride: tl.int64,
    dlogits_ptr,  # like logits; may be logits itself, or None
    dbatch_stride: tl.int64,
    drow_stride: tl.int64,
    ids_ptr,  # [B, T]
    mask_ptr,  # [N], fields of the tokens; see TokenFields
    sequence_ids_ptr,  # may be None, like the next ones except the weights
    advantages_ptr,
    weights_ptr,
    policy_factors_ptr,
    entropy_weights_ptr,
    old_logprobs_ptr,
    ref_logprobs_ptr,
    logprobs_ptr,  # [B, T], like the next two
    entropy_ptr,
    live_ptr,
    rewards_ptr,  # [S] or None
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
    loss_params,  # LossParams
    eps: tl.float64,
    IS_SCALED: tl.constexpr,
    VARIANT: tl.constexpr,  # LossVariant
    LAYOUT: tl.constexpr,  # Layout
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
    if rewards_ptr is not None:
        # every program writes the same values to the same addresses, so each can read them after its own barrier
        eps_ = tl.full([], eps, tl.float64)
        write_group_advantages(
            rewards_ptr, advantages_ptr, sequences, num_generations, eps_, first_bad_ptr, IS_SCALED, LANES
        )
        tl.debug_barrier()
    unmasked, next_id = _load_token(mask_ptr, ids_ptr, tl.program_id(0), rows, rows_per_batch, length)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        b = row // rows_per_batch
        t = row % rows_per_batch
        n = b * length + t
        inside = t < length
        is_row, raw_id = unmasked, next_id
        token = tl.full([], 0, tl.int32)
        unmasked, next_id = _load_token(mask_ptr, ids_ptr, row + tl.num_programs(0), rows, rows_per_batch, length)
        c = tl.full([], 0.0, ACC)
        c_h = tl.full([], 0.0, ACC)
        logprob = tl.full([], 0.0, ACC)
        entropy = tl.full([], 0.0, ACC)
        dtarget = tl.full([], 0.0, ACC)
        base = tl.full([], 0.0, ACC)
        row_sum = tl.full([], 1.0, ACC)
        start, shift = row_shift(b, t, batch_stride, row_stride, ALIGNMENT, VECTOR)
        row_ptr = logits_ptr + start
        if is_row:
            token = clamp_id(raw_id, n, vocab, first_bad_ptr)
            target = transform(tl.load(row_ptr + shift + token).to(ACC), inner_, CURVE)
            if dlogits_ptr is not None:  # loaded here, to overlap with the statistics
                s = completion_of(sequence_ids_ptr, b, n, True)
                advantage = load_field(advantages_ptr, s, n, True, LAYOUT.advantages)
                weight = load_field(weights_ptr, s, n, True, LAYOUT.weights)
                policy_weight = weight
                if policy_factors_ptr is not None:
                    policy_weight *= tl.load(policy_factors_ptr + n)
                old_logprob = tl.load(old_logprobs_ptr + n) if old_logprobs_ptr is not None else target
                ref_logprob = tl.load(ref_logprobs_ptr + n) if ref_logprobs_ptr is not None else target
                if entropy_weights_ptr is not None:
                    c_h = -load_field(entropy_weights_ptr, s, n, True, LAYOUT.entropy_weights)
            base, row_sum, weighted = row_statistics(
                row_ptr, columns, shift, vocab, inner_, rate_, CURVE, ALIGNMENT, ACC
            )
            logprob, entropy, _ = row_results(base, row_sum, weighted, target, wide_rate, ACC)
            if dlogits_ptr is not None:
                if old_logprobs_ptr is None:
                    old_logprob = logprob  # on-policy: the log-ratio is 0, or NaN
                _, dlog_ratio, dlogprob, _, _, _ = token_loss(
                    logprob,
                    logprob - old_logprob,
                    logprob == logprob,
                    old_logprob,
                    ref_logprob,
                    advantage,
                    policy_weight,
                    weight,
                    loss_params,
                    ref_logprobs_ptr is not None,
                    VARIANT,
                )
                c = dlog_ratio + dlogprob
                dtarget = token_gradient(target, logprob, entropy, c, c_h, slope_, CURVE)
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
                    entropy_weights_ptr is not None, CURVE, ALIGNMENT, ACC,
                )  # fmt: skip
                tl.debug_barrier()  # then overwrite what another thread wrote there
                tl.store(drow_ptr + dshift + token, dtarget.to(dlogits_ptr.dtype.element_ty))
            else:
                zero_row(drow_ptr, columns, dshift, vocab, ALIGNMENT)


def grpo_loss_fwd(
    logits: Tensor,  # [B, T or T + 1, V]
    call: LossRowsCall,
    dlogits: Tensor | None,  # like logits
) -> tuple[Tensor, ...]:
    """The registered op."""
    dtype, ids, fields, group = accumulation_dtype(logits.dtype), call.ids, call.fields, call.group
    rewards = group.rewards
    check_rows(logits, ids, dlogits)
    if (fields.advantages is None) == (rewards is None):
        raise ValueError("advantages or rewards must be given, and not both")
    computed_advantages = ids.new_empty(0 if rewards is None else rewards.numel(), dtype=dtype)
    if rewards is not None:
        check_tokens(rewards.numel(), dtype, rewards=rewards)
        fields = replace(fields, advantages=computed_advantages)
    check_fields(fields, ids.shape[0], ids.numel(), dtype)
    variant = loss_variant(call.code.options)
    if call.code.options[Option.LEVEL] != Level.TOKEN:
        raise ValueError("options must be token-local: a sequence-level ratio needs every token's statistics first")
    logprobs, entropy = (torch.empty_like(ids, dtype=dtype) for _ in range(2))
    live = torch.empty_like(ids, dtype=torch.bool)
    rows, vocab, vector = logits.shape[0] * logits.shape[1], logits.shape[-1], vector_of(logits.dtype)
    if rows == 0:
        return logprobs, entropy, live, computed_advantages
    blocks = blocks_of("statistics" if dlogits is None else "loss", vocab, logits.element_size(), logits.device)
    with nullcontext() if dlogits is None else rounded(dlogits) as out:
        strides = row_strides(logits)
        dstrides = strides if out is None else row_strides(out)
        alignment = alignment_of(vector, strides, dstrides)
        is_plain = alignment == Alignment.ALIGNED and vocab % vector == 0
        grid, sizes = blocks.launch(rows, vector, logits.device, is_plain)
        _grpo_loss_kernel[grid](
            logits,
            *strides,
            out,
            *dstrides,
            ids,
            *kernel_fields(fields),
            logprobs,
            entropy,
            as_bytes(live),
            rewards,
            first_bad(ids.device),
            rows,
            logits.shape[1],
            ids.shape[1],
            computed_advantages.numel(),
            group.num_generations,
            vocab,
            *transform_arguments(call.transform),
            encode(call.code.params),
            group.eps,
            IS_SCALED=group.is_scaled,
            VARIANT=variant,
            LAYOUT=layout_of(fields),
            CURVE=curve_of(call.transform),
            ALIGNMENT=alignment,
            ACC=arithmetic(logits.dtype),
            **sizes,
        )
    return logprobs, entropy, live, computed_advantages
