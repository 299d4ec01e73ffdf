"""Triton kernels of ``policy_loss`` and their launcher: one program a sequence, then one that adds them in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_kernels.device_values import first_bad
from grpo_kernels.loss.metrics import KERNEL_PARTIALS, Partial
from grpo_kernels.loss.options import KL_ESTIMATORS, Level, Option, Param, Surrogate
from grpo_kernels.ops.tokens.triton.launch import arithmetic, as_bytes, check_tokens
from grpo_kernels.ops.tokens.triton.policy_math import averaged_log_ratio, token_loss

_BLOCK = 1024  # tokens, or sequences, that a program holds at once
_WARPS = 16

# rows of the table of per-sequence totals: those of Partial, then the loss
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


def policy_arguments(params: list[float]) -> tuple[float, ...]:
    """The real parameters, in the order in which kernels take them."""
    if len(params) != len(Param):
        raise ValueError(f"params must have {len(Param)} entries, got {len(params)}")
    return tuple(params[p] for p in Param)


def policy_variant(options: list[int]) -> dict[str, int]:
    """What a kernel is compiled for.

    Raises:
        ValueError: There is an option that these kernels do not know.
    """
    if len(options) != len(Option):
        raise ValueError(f"options must have {len(Option)} entries, got {len(options)}")
    known = {Option.SURROGATE: Surrogate, Option.LEVEL: Level, Option.KL_ESTIMATOR: KL_ESTIMATORS.values()}
    for option, values in known.items():
        if options[option] not in list(values):
            raise ValueError(f"options must have a {option.name} that the kernels know, got {options[option]}")
    return {
        "SURROGATE": options[Option.SURROGATE],
        "LEVEL": options[Option.LEVEL],
        "KL_ESTIMATOR": options[Option.KL_ESTIMATOR],
        "KL_GRADIENT": options[Option.KL_GRADIENT],
        "BIAS_CORRECTED": options[Option.BIAS_CORRECTED_KL],
    }


@triton.jit(do_not_specialize=["tokens", "sequences"])
def _policy_loss_kernel(
    logprobs_ptr,  # [N]
    entropy_ptr,  # [N] or None
    mask_ptr,  # [N], like the next three
    advantages_ptr,
    policy_weights_ptr,
    kl_weights_ptr,
    entropy_weights_ptr,  # [N] or None, like the next two
    old_logprobs_ptr,
    ref_logprobs_ptr,
    offsets_ptr,  # [S + 1]
    dlogprobs_ptr,  # [N]
    totals_ptr,  # [KERNEL_PARTIALS + 1, S] fp64
    first_bad_ptr,  # [4] or None
    tokens,
    sequences,
    ratio_low: tl.float64,
    ratio_high: tl.float64,
    delta: tl.float64,
    beta: tl.float64,
    temperature_pos: tl.float64,
    temperature_neg: tl.float64,
    log_ratio_clamp: tl.float64,
    kl_clamp: tl.float64,
    SURROGATE: tl.constexpr,
    LEVEL: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    KL_GRADIENT: tl.constexpr,
    BIAS_CORRECTED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    begin = tl.maximum(tl.load(offsets_ptr + s), 0)
    end = tl.minimum(tl.load(offsets_ptr + s + 1), tokens)  # values are not checked on a GPU; reads stay inside
    lanes = tl.arange(0, BLOCK)
    mean = tl.full([], 0.0, ACC)
    is_alone = end > begin
    low_ = tl.full([], ratio_low, ACC)
    high_ = tl.full([], ratio_high, ACC)
    if LEVEL != _TOKEN_LEVEL:
        log_ratios = tl.zeros([BLOCK], tl.float64)
        count = tl.zeros([BLOCK], tl.float64)
        for start in range(begin, end, BLOCK):
            n = start + lanes
            live = tl.load(mask_ptr + n, mask=n < end, other=0) != 0
            logprob = tl.load(logprobs_ptr + n, mask=live, other=0.0)
            old_logprob = logprob  # on-policy 0, or a NaN's NaN
            if old_logprobs_ptr is not None:
                old_logprob = tl.load(old_logprobs_ptr + n, mask=live, other=0.0)
            advantage = tl.load(advantages_ptr + n, mask=live, other=0.0)
            averaged, _ = averaged_log_ratio(logprob - old_logprob, advantage, low_, high_, LEVEL)
            log_ratios += tl.where(live, averaged, 0.0).to(tl.float64)
            count += live.to(tl.float64)
        total = tl.sum(count, 0)
        is_alone = total == 1
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
        log_ratio = logprob - old_logprob  # on-policy 0, or a NaN's NaN
        if LEVEL != _TOKEN_LEVEL:
            log_ratio = tl.zeros([BLOCK], ACC) + mean
        ref_logprob = logprob
        if ref_logprobs_ptr is not None:
            ref_logprob = tl.load(ref_logprobs_ptr + n, mask=live, other=0.0)
        loss, dlog_ratio, dlogprob, kl, is_low, is_high = token_loss(
            logprob,
            log_ratio,
            is_alone,
            old_logprob,
            ref_logprob,
            tl.load(advantages_ptr + n, mask=live, other=0.0),
            tl.load(policy_weights_ptr + n, mask=live, other=0.0),
            tl.load(kl_weights_ptr + n, mask=live, other=0.0),
            low_,
            high_,
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
                losses -= tl.load(entropy_weights_ptr + n, mask=live, other=0.0).to(tl.float64) * entropy
        if (LEVEL == _SEQUENCE_LEVEL) | (LEVEL == _GEOMETRIC_LEVEL):
            dmeans += tl.where(live, dlog_ratio, 0.0).to(tl.float64)
        else:
            dlogprob += dlog_ratio
        tl.store(dlogprobs_ptr + n, tl.where(live, dlogprob, 0.0), mask=n < end)
    if first_bad_ptr is not None:
        index = tl.min(first_infinite, 0)
        if index < end:
            tl.atomic_min(first_bad_ptr + 3, index)
    total = tl.sum(count, 0)
    share = tl.where(total > 0, total, 1.0)
    if (LEVEL == _SEQUENCE_LEVEL) | (
        LEVEL == _GEOMETRIC_LEVEL
    ):  # the mean hands its derivative to its tokens in equal parts
        part = (tl.sum(dmeans, 0) / share).to(ACC)
        tl.debug_barrier()  # what is read here, other threads may have written
        for start in range(begin, end, BLOCK):
            n = start + lanes
            live = tl.load(mask_ptr + n, mask=n < end, other=0) != 0
            if LEVEL == _GEOMETRIC_LEVEL:
                log_ratio = tl.load(logprobs_ptr + n, mask=live, other=0.0)
                if old_logprobs_ptr is not None:
                    log_ratio -= tl.load(old_logprobs_ptr + n, mask=live, other=0.0)
                else:
                    log_ratio -= log_ratio
                advantage = tl.load(advantages_ptr + n, mask=live, other=0.0)
                _, passes = averaged_log_ratio(log_ratio, advantage, low_, high_, LEVEL)
                live = live & passes
            dlogprob = tl.load(dlogprobs_ptr + n, mask=live, other=0.0)
            tl.store(dlogprobs_ptr + n, dlogprob + part, mask=live)
    low = tl.sum(lows, 0)
    high = tl.sum(highs, 0)
    low_min = low / share
    high_max = high / share
    ratios = total
    if LEVEL == _SEQUENCE_LEVEL:
        ratios = total * 0.0 + 1.0
        low = low_min
        high = high_max
    else:  # a sequence without a token has no share; at sequence level it still has a ratio, of 1
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
    """One program a total: sequences in order, whatever program wrote them."""
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


def policy_loss_fwd(
    logprobs: Tensor,  # [N]
    entropy: Tensor | None,  # [N]
    mask: Tensor,
    advantages: Tensor,
    policy_weights: Tensor,
    kl_weights: Tensor,
    entropy_weights: Tensor | None,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    offsets: Tensor,  # [S + 1]
    options: list[int],
    params: list[float],
    keeps_infinite: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The registered op."""
    tokens, dtype = logprobs.shape[0], logprobs.dtype
    check_tokens(tokens, torch.bool, mask=mask)
    check_tokens(tokens, dtype, entropy=entropy, advantages=advantages, policy_weights=policy_weights)
    check_tokens(tokens, dtype, kl_weights=kl_weights, entropy_weights=entropy_weights)
    check_tokens(tokens, dtype, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs)
    check_tokens(offsets.numel(), torch.int64, offsets=offsets)
    sequences = offsets.shape[0] - 1
    loss, partials = logprobs.new_empty(()), logprobs.new_empty(KERNEL_PARTIALS)
    dlogprobs = torch.empty_like(logprobs)
    totals = logprobs.new_empty((KERNEL_PARTIALS + 1, sequences), dtype=torch.float64)
    variant = policy_variant(options)
    if sequences:
        _policy_loss_kernel[(sequences,)](
            logprobs,
            entropy,
            as_bytes(mask),
            advantages,
            policy_weights,
            kl_weights,
            entropy_weights,
            old_logprobs,
            ref_logprobs,
            offsets,
            dlogprobs,
            totals,
            first_bad(logprobs.device) if keeps_infinite else None,
            logprobs.shape[0],
            sequences,
            *policy_arguments(params),
            **variant,
            ACC=arithmetic(logprobs.dtype),
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )
    _totals_kernel[(KERNEL_PARTIALS + 1,)](totals, loss, partials, sequences, BLOCK=_BLOCK)
    return loss, dlogprobs, partials
