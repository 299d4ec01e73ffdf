"""Triton kernels of ``policy_loss`` and their launcher: one program per sequence, then one per total."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_kernels.device_values import first_bad
from grpo_kernels.loss.fields import check_fields
from grpo_kernels.loss.metrics import KERNEL_PARTIALS, Partial
from grpo_kernels.loss.options import Level
from grpo_kernels.ops.tokens.calls import PolicyLossCall
from grpo_kernels.ops.tokens.triton.fields import FIELDS, completion_of, kernel_fields, layout_of, load_field
from grpo_kernels.ops.tokens.triton.launch import arithmetic, check_tokens
from grpo_kernels.ops.tokens.triton.policy_math import averaged_log_ratio, encode, loss_variant, token_loss

_BLOCK = 1024  # tokens, or sequences, per block
_WARPS = 16

# rows of the table of per-sequence totals: the partials, then the loss
_TOKENS = tl.constexpr(int(Partial.TOKENS))
_RATIOS = tl.constexpr(int(Partial.RATIOS))
_KL = tl.constexpr(int(Partial.KL))
_ENTROPY = tl.constexpr(int(Partial.ENTROPY))
_LOW = tl.constexpr(int(Partial.LOW))
_HIGH = tl.constexpr(int(Partial.HIGH))
_LOW_MIN = tl.constexpr(int(Partial.LOW_MIN))
_HIGH_MAX = tl.constexpr(int(Partial.HIGH_MAX))
_LOSS = tl.constexpr(int(KERNEL_PARTIALS))
_TOKEN_LEVEL = tl.constexpr(int(Level.TOKEN))
_SEQUENCE_LEVEL = tl.constexpr(int(Level.SEQUENCE))
_GEOMETRIC_LEVEL = tl.constexpr(int(Level.GEOMETRIC))


@triton.jit(do_not_specialize=[*FIELDS, "tokens", "sequences", "loss_params"])
def _policy_loss_kernel(
    logprobs_ptr,  # [N]
    entropy_ptr,  # [N] or None
    mask_ptr,  # [N], fields of the tokens; see TokenFields
    sequence_ids_ptr,  # may be None, like the next ones except the weights
    advantages_ptr,
    weights_ptr,
    policy_factors_ptr,
    entropy_weights_ptr,
    old_logprobs_ptr,
    ref_logprobs_ptr,
    offsets_ptr,  # [S + 1], or None if all sequences have the same length
    dlogprobs_ptr,  # [N]
    totals_ptr,  # [KERNEL_PARTIALS + 1, S] fp64
    first_bad_ptr,  # [4] or None
    tokens,
    sequences,
    loss_params,  # LossParams
    VARIANT: tl.constexpr,  # LossVariant
    LAYOUT: tl.constexpr,  # Layout
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    if offsets_ptr is not None:
        begin = tl.maximum(tl.load(offsets_ptr + s), 0)
        end = tl.minimum(tl.load(offsets_ptr + s + 1), tokens)  # not checked on a GPU: keep reads in bounds
    else:
        begin = s * (tokens // sequences)
        end = begin + tokens // sequences
    lanes = tl.arange(0, BLOCK)
    mean = tl.full([], 0.0, ACC)
    is_single_token = end > begin
    if VARIANT.level != _TOKEN_LEVEL:
        log_ratios = tl.zeros([BLOCK], tl.float64)
        count = tl.zeros([BLOCK], tl.float64)
        for start in range(begin, end, BLOCK):
            n = start + lanes
            live = tl.load(mask_ptr + n, mask=n < end, other=0) != 0
            logprob = tl.load(logprobs_ptr + n, mask=live, other=0.0)
            old_logprob = logprob  # on-policy: the log-ratio is 0, or NaN
            if old_logprobs_ptr is not None:
                old_logprob = tl.load(old_logprobs_ptr + n, mask=live, other=0.0)
            advantage = load_field(
                advantages_ptr, completion_of(sequence_ids_ptr, s, n, live), n, live, LAYOUT.advantages
            )
            averaged, _ = averaged_log_ratio(logprob - old_logprob, advantage, loss_params, VARIANT)
            log_ratios += tl.where(live, averaged, 0.0).to(tl.float64)
            count += live.to(tl.float64)
        total = tl.sum(count, 0)
        is_single_token = total == 1
        mean = (tl.sum(log_ratios, 0) / tl.where(total > 0, total, 1.0)).to(ACC)
    losses = tl.zeros([BLOCK], tl.float64)
    count = tl.zeros([BLOCK], tl.float64)
    kls = tl.zeros([BLOCK], tl.float64)
    entropies = tl.zeros([BLOCK], tl.float64)
    lows = tl.zeros([BLOCK], tl.float64)
    highs = tl.zeros([BLOCK], tl.float64)
    dmeans = tl.zeros([BLOCK], tl.float64)
    first_infinite = tl.zeros([BLOCK], tl.int64) + end
    for start in range(begin, end, BLOCK):
        n = start + lanes
        live = tl.load(mask_ptr + n, mask=n < end, other=0) != 0
        # a masked token reads 0 everywhere, weights included, and so adds 0
        logprob = tl.load(logprobs_ptr + n, mask=live, other=0.0)
        old_logprob = logprob
        if old_logprobs_ptr is not None:
            old_logprob = tl.load(old_logprobs_ptr + n, mask=live, other=0.0)
        log_ratio = logprob - old_logprob  # on-policy: 0, or NaN
        if VARIANT.level != _TOKEN_LEVEL:
            log_ratio = tl.zeros([BLOCK], ACC) + mean
        completion = completion_of(sequence_ids_ptr, s, n, live)
        weight = load_field(weights_ptr, completion, n, live, LAYOUT.weights)
        policy_weight = weight
        if policy_factors_ptr is not None:
            policy_weight *= tl.load(policy_factors_ptr + n, mask=live, other=0.0)
        ref_logprob = logprob
        if ref_logprobs_ptr is not None:
            ref_logprob = tl.load(ref_logprobs_ptr + n, mask=live, other=0.0)
        loss, dlog_ratio, dlogprob, kl, is_low, is_high = token_loss(
            logprob,
            log_ratio,
            is_single_token,
            old_logprob,
            ref_logprob,
            load_field(advantages_ptr, completion, n, live, LAYOUT.advantages),
            policy_weight,
            weight,
            loss_params,
            ref_logprobs_ptr is not None,
            VARIANT,
        )
        if first_bad_ptr is not None:
            first_infinite = tl.minimum(first_infinite, tl.where(live & (tl.abs(loss) == float("inf")), n, end))
        losses += tl.where(live, loss, 0.0).to(tl.float64)
        kls += tl.where(live, kl, 0.0).to(tl.float64)
        count += live.to(tl.float64)
        lows += (live & is_low).to(tl.float64)
        highs += (live & is_high).to(tl.float64)
        if entropy_ptr is not None:
            entropy = tl.load(entropy_ptr + n, mask=live, other=0.0).to(tl.float64)
            entropies += entropy
            if entropy_weights_ptr is not None:
                losses -= (
                    load_field(entropy_weights_ptr, completion, n, live, LAYOUT.entropy_weights).to(tl.float64)
                    * entropy
                )
        if (VARIANT.level == _SEQUENCE_LEVEL) | (VARIANT.level == _GEOMETRIC_LEVEL):
            dmeans += tl.where(live, dlog_ratio, 0.0).to(tl.float64)
        else:
            dlogprob += dlog_ratio
        tl.store(dlogprobs_ptr + n, tl.where(live, dlogprob, 0.0), mask=n < end)
    if first_bad_ptr is not None:
        index = tl.min(first_infinite, 0)
        if index < end:
            tl.atomic_min(first_bad_ptr + 3, index)
    total = tl.sum(count, 0)
    divisor = tl.where(total > 0, total, 1.0)
    if (VARIANT.level == _SEQUENCE_LEVEL) | (VARIANT.level == _GEOMETRIC_LEVEL):
        # d mean / d log-ratio is 1 / tokens for every token
        dlog_ratio_of_mean = (tl.sum(dmeans, 0) / divisor).to(ACC)
        tl.debug_barrier()  # the loads below read what other threads stored above
        for start in range(begin, end, BLOCK):
            n = start + lanes
            live = tl.load(mask_ptr + n, mask=n < end, other=0) != 0
            if VARIANT.level == _GEOMETRIC_LEVEL:
                log_ratio = tl.load(logprobs_ptr + n, mask=live, other=0.0)
                if old_logprobs_ptr is not None:
                    log_ratio -= tl.load(old_logprobs_ptr + n, mask=live, other=0.0)
                else:
                    log_ratio -= log_ratio
                advantage = load_field(
                    advantages_ptr, completion_of(sequence_ids_ptr, s, n, live), n, live, LAYOUT.advantages
                )
                _, has_gradient = averaged_log_ratio(log_ratio, advantage, loss_params, VARIANT)
                live = live & has_gradient
            dlogprob = tl.load(dlogprobs_ptr + n, mask=live, other=0.0)
            tl.store(dlogprobs_ptr + n, dlogprob + dlog_ratio_of_mean, mask=live)
    low = tl.sum(lows, 0)
    high = tl.sum(highs, 0)
    low_min = low / divisor
    high_max = high / divisor
    ratios = total
    if VARIANT.level == _SEQUENCE_LEVEL:
        ratios = total * 0.0 + 1.0
        low = low_min
        high = high_max
    else:  # an empty sequence has no clip fraction, except at sequence level, where it has one ratio, 1
        low_min = tl.where(total > 0, low_min, float("inf"))
        high_max = tl.where(total > 0, high_max, float("-inf"))
    row = totals_ptr + s
    tl.store(row + _TOKENS * sequences, total)
    tl.store(row + _RATIOS * sequences, ratios)
    tl.store(row + _KL * sequences, tl.sum(kls, 0))
    tl.store(row + _ENTROPY * sequences, tl.sum(entropies, 0))
    tl.store(row + _LOW * sequences, low)
    tl.store(row + _HIGH * sequences, high)
    tl.store(row + _LOW_MIN * sequences, low_min)
    tl.store(row + _HIGH_MAX * sequences, high_max)
    tl.store(row + _LOSS * sequences, tl.sum(losses, 0))


@triton.jit(do_not_specialize=["sequences"])
def _totals_kernel(totals_ptr, loss_ptr, partials_ptr, sequences, BLOCK: tl.constexpr):
    """Adds a total over the sequences, in an order that does not depend on the programs that wrote them."""
    which = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    row = totals_ptr + which.to(tl.int64) * sequences
    is_minimum = which == _LOW_MIN
    is_maximum = which == _HIGH_MAX
    neutral = tl.where(is_minimum, float("inf"), tl.where(is_maximum, float("-inf"), 0.0)).to(tl.float64)
    acc = tl.zeros([BLOCK], tl.float64) + neutral
    for start in range(0, sequences, BLOCK):
        inside = start + lanes < sequences
        value = tl.where(inside, tl.load(row + start + lanes, mask=inside, other=0.0), neutral)
        extreme = tl.where(is_minimum, tl.minimum(acc, value), tl.maximum(acc, value))
        acc = tl.where(is_minimum | is_maximum, extreme, acc + value)
    total = tl.sum(acc, 0)
    total = tl.where(is_minimum, tl.min(acc, 0), tl.where(is_maximum, tl.max(acc, 0), total))
    if which == _LOSS:
        tl.store(loss_ptr, total.to(loss_ptr.dtype.element_ty))
    else:
        tl.store(partials_ptr + which, total.to(partials_ptr.dtype.element_ty))


def policy_loss_fwd(logprobs: Tensor, entropy: Tensor | None, call: PolicyLossCall) -> tuple[Tensor, ...]:  # [N], [N]
    """The registered op."""
    tokens, sequences, dtype = logprobs.numel(), call.sequences, logprobs.dtype
    check_fields(call.fields, sequences, tokens, dtype)
    if call.fields.advantages is None:
        raise ValueError("advantages must be given, got None")
    check_tokens(tokens, dtype, entropy=entropy)
    check_tokens(sequences + 1, torch.int64, offsets=call.offsets)
    loss, partials = logprobs.new_empty(()), logprobs.new_empty(KERNEL_PARTIALS)
    dlogprobs = torch.empty_like(logprobs)
    totals = logprobs.new_empty((KERNEL_PARTIALS + 1, sequences), dtype=torch.float64)
    variant = loss_variant(call.code.options)
    if sequences:
        _policy_loss_kernel[(sequences,)](
            logprobs,
            entropy,
            *kernel_fields(call.fields),
            call.offsets,
            dlogprobs,
            totals,
            first_bad(logprobs.device) if call.flags_infinite else None,
            tokens,
            sequences,
            encode(call.code.params),
            VARIANT=variant,
            LAYOUT=layout_of(call.fields),
            ACC=arithmetic(logprobs.dtype),
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )
    _totals_kernel[(KERNEL_PARTIALS + 1,)](totals, loss, partials, sequences, BLOCK=_BLOCK)
    return loss, dlogprobs, partials
