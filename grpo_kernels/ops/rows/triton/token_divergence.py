"""The Triton kernel of ``token_divergence`` and its launcher: a program handles a row and its reference row."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_kernels.device_values import first_bad
from grpo_kernels.dtypes import accumulation_dtype
from grpo_kernels.ops.rows.calls import DivergenceCall
from grpo_kernels.ops.rows.triton.divergence import (
    JENSEN_SHANNON,
    divergence_gradient,
    row_divergence,
    row_divergence_gradient,
    row_start,
)
from grpo_kernels.ops.rows.triton.launch import (
    STRIDES,
    TOKENS,
    Alignment,
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
    row_results,
    row_statistics,
    slope_at,
    token_gradient,
    transform,
    zero_row,
)
from grpo_kernels.ops.tokens.triton.launch import arithmetic, as_bytes, check_tokens, rounded, row_strides

_TOKENS = ["logprobs_ptr", "entropy_ptr", "divergence_ptr", "dlogprobs_ptr", "dentropy_ptr", "ddivergence_ptr"]
_REFERENCE = ["reference_batch_stride", "reference_row_stride"]


@triton.jit(do_not_specialize=[*STRIDES, *_REFERENCE, *TOKENS, *_TOKENS, "rows", "rows_per_batch", "length"])
def _token_divergence_kernel(
    logits_ptr,  # [B, T or T + 1, V]
    batch_stride: tl.int64,
    row_stride: tl.int64,
    reference_ptr,  # like logits
    reference_batch_stride: tl.int64,
    reference_row_stride: tl.int64,
    dlogits_ptr,  # like logits; may be logits itself, or None
    dbatch_stride: tl.int64,
    drow_stride: tl.int64,
    ids_ptr,  # [B, T], like all that follow
    mask_ptr,  # or None
    dlogprobs_ptr,  # or None
    dentropy_ptr,  # or None
    ddivergence_ptr,  # or None
    logprobs_ptr,
    entropy_ptr,
    divergence_ptr,
    first_bad_ptr,  # [4]
    rows,
    rows_per_batch,
    length,
    vocab,
    mixture: tl.float64,
    inner: tl.float64,
    rate: tl.float64,
    slope: tl.float64,
    divergence_rate: tl.float64,
    divergence_slope: tl.float64,
    reference_inner: tl.float64,
    reference_rate: tl.float64,
    KIND: tl.constexpr,
    SAME_TEMPERATURE: tl.constexpr,
    CURVE: tl.constexpr,
    REFERENCE_CURVE: tl.constexpr,
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
    wide_divergence_rate = tl.full([], divergence_rate, tl.float64)
    divergence_rate_ = wide_divergence_rate.to(ACC)
    divergence_slope_ = tl.full([], divergence_slope, ACC)
    reference_inner_ = tl.full([], reference_inner, ACC)
    wide_reference_rate = tl.full([], reference_rate, tl.float64)
    reference_rate_ = wide_reference_rate.to(ACC)
    mixture_ = tl.full([], mixture, ACC)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        b = row // rows_per_batch
        t = row % rows_per_batch
        n = b * length + t
        unmasked = t < length
        if mask_ptr is not None:
            unmasked = unmasked & (tl.load(mask_ptr + n, mask=unmasked, other=0) != 0)
        logprob = tl.full([], 0.0, ACC)
        entropy = tl.full([], 0.0, ACC)
        value = tl.full([], 0.0, ACC)
        is_live = n < 0
        if unmasked:
            token = clamp_id(tl.load(ids_ptr + n), n, vocab, first_bad_ptr)
            start = row_start(b, t, batch_stride, row_stride, ALIGNMENT, VECTOR)
            reference_start = row_start(b, t, reference_batch_stride, reference_row_stride, ALIGNMENT, VECTOR)
            row_ptr = logits_ptr + start
            reference_row_ptr = reference_ptr + reference_start
            target = transform(tl.load(row_ptr + token).to(ACC), inner_, CURVE)
            max_v, row_sum, weighted = row_statistics(row_ptr, columns, 0, vocab, inner_, rate_, CURVE, ALIGNMENT, ACC)
            logprob, entropy, lse = row_results(max_v, row_sum, weighted, target, wide_rate, ACC)
            base, log_sum = base_and_log_sum(lse, wide_rate, ACC)
            divergence_logprob = logprob
            if not SAME_TEMPERATURE:
                max_v, row_sum, weighted = row_statistics(
                    row_ptr, columns, 0, vocab, inner_, divergence_rate_, CURVE, ALIGNMENT, ACC
                )
                divergence_logprob, _divergence_entropy, lse = row_results(
                    max_v, row_sum, weighted, target, wide_divergence_rate, ACC
                )
            divergence_base, divergence_log_sum = base_and_log_sum(lse, wide_divergence_rate, ACC)
            reference_target = transform(tl.load(reference_row_ptr + token).to(ACC), reference_inner_, REFERENCE_CURVE)
            max_v, row_sum, weighted = row_statistics(
                reference_row_ptr, columns, 0, vocab, reference_inner_, reference_rate_, REFERENCE_CURVE, ALIGNMENT, ACC
            )
            reference_logprob, _reference_entropy, lse = row_results(
                max_v, row_sum, weighted, reference_target, wide_reference_rate, ACC
            )
            reference_base, reference_log_sum = base_and_log_sum(lse, wide_reference_rate, ACC)
            value, centre = row_divergence(
                row_ptr, reference_row_ptr, columns, vocab,
                divergence_base, divergence_log_sum, inner_, divergence_rate_,
                reference_base, reference_log_sum, reference_inner_, reference_rate_,
                mixture_, KIND, CURVE, REFERENCE_CURVE, ACC,
            )  # fmt: skip
            if dlogits_ptr is not None:
                c = tl.full([], 0.0, ACC)
                c_h = tl.full([], 0.0, ACC)
                c_d = tl.full([], 0.0, ACC)
                if dlogprobs_ptr is not None:
                    c = tl.load(dlogprobs_ptr + n)
                if dentropy_ptr is not None:
                    c_h = tl.load(dentropy_ptr + n)
                if ddivergence_ptr is not None:
                    c_d = tl.load(ddivergence_ptr + n)
                is_live = (c != 0) | (c_h != 0) | (c_d != 0)
                if is_live:
                    tl.debug_barrier()  # every thread has read the token's logit before any overwrites it
                    dstart = row_start(b, t, dbatch_stride, drow_stride, ALIGNMENT, VECTOR)
                    drow_ptr = dlogits_ptr + dstart
                    row_divergence_gradient(
                        row_ptr, reference_row_ptr, drow_ptr, columns, vocab, base, log_sum, inner_, rate_, slope_,
                        divergence_base, divergence_log_sum, divergence_rate_, divergence_slope_,
                        reference_base, reference_log_sum, reference_inner_, reference_rate_,
                        entropy, centre, c, c_h, c_d,
                        mixture_, KIND, SAME_TEMPERATURE, CURVE, REFERENCE_CURVE, ACC,
                    )  # fmt: skip
                    dtarget = token_gradient(target, logprob, entropy, c, c_h, slope_, CURVE)
                    dtarget_divergence = divergence_gradient(
                        divergence_logprob, tl.exp(divergence_logprob), reference_logprob, centre, mixture_, KIND
                    )
                    dtarget_divergence *= c_d * slope_at(target, divergence_slope_, CURVE)
                    dtarget += tl.where(c_d != 0, dtarget_divergence, 0.0)
                    tl.debug_barrier()  # then overwrite what another thread wrote there
                    tl.store(drow_ptr + token, dtarget.to(dlogits_ptr.dtype.element_ty))
        if t < length:
            tl.store(logprobs_ptr + n, logprob)
            tl.store(entropy_ptr + n, entropy)
            tl.store(divergence_ptr + n, value)
        if dlogits_ptr is not None:  # noqa: SIM102  a constant
            if is_live == 0:
                dstart = row_start(b, t, dbatch_stride, drow_stride, ALIGNMENT, VECTOR)
                zero_row(dlogits_ptr + dstart, columns, 0, vocab, ALIGNMENT)


def token_divergence(
    logits: Tensor,  # [B, T or T + 1, V]
    reference_logits: Tensor,  # like logits
    call: DivergenceCall,
    dlogits: Tensor | None,  # like logits
) -> tuple[Tensor, ...]:
    """The registered op."""
    ids, mask, comparison = call.ids, call.mask, call.comparison
    dlogprobs, dentropy, ddivergence = call.dlogprobs, call.dentropy, call.ddivergence
    check_rows(logits, ids, dlogits)
    check_rows(reference_logits, ids, logits)
    check_tokens(ids.numel(), torch.bool, mask=mask)
    acc = accumulation_dtype(logits.dtype)
    check_tokens(ids.numel(), acc, dlogprobs=dlogprobs, dentropy=dentropy, ddivergence=ddivergence)
    logprobs, entropy, divergence = (torch.empty_like(ids, dtype=acc) for _ in range(3))
    rows, vocab, vector = logits.shape[0] * logits.shape[1], logits.shape[-1], vector_of(logits.dtype)
    if rows == 0:
        return logprobs, entropy, divergence
    blocks = blocks_of("loss", vocab, logits.element_size(), logits.device)
    with nullcontext() if dlogits is None else rounded(dlogits) as out:
        strides, reference_strides = row_strides(logits), row_strides(reference_logits)
        dstrides = None if out is None else row_strides(out)
        is_aligned = all(stride % vector == 0 for stride in strides + reference_strides + (dstrides or ()))
        grid, sizes = blocks.launch(rows, vector, logits.device, False)
        inner, rate, slope = transform_arguments(comparison.transform)
        _, divergence_rate, divergence_slope = transform_arguments(comparison.divergence_transform)
        reference_inner, reference_rate, _ = transform_arguments(comparison.reference_transform)
        mixture = comparison.mixture
        _token_divergence_kernel[grid](
            logits,
            *strides,
            reference_logits,
            *reference_strides,
            out,
            *(dstrides or (0, 0)),
            ids,
            as_bytes(mask),
            dlogprobs,
            dentropy,
            ddivergence,
            logprobs,
            entropy,
            divergence,
            first_bad(ids.device),
            rows,
            logits.shape[1],
            ids.shape[1],
            vocab,
            mixture,
            inner,
            rate,
            slope,
            divergence_rate,
            divergence_slope,
            reference_inner,
            reference_rate,
            KIND=int(mixture) if mixture in (0.0, 1.0) else JENSEN_SHANNON.value,
            SAME_TEMPERATURE=comparison.divergence_temperature == comparison.temperature,
            CURVE=curve_of(comparison.transform),
            REFERENCE_CURVE=curve_of(comparison.reference_transform),
            ALIGNMENT=Alignment.ALIGNED if is_aligned else Alignment.LOOSE,
            ACC=arithmetic(logits.dtype),
            **sizes,
        )
    return logprobs, entropy, divergence
