"""The weights of tokens: loss types and rollout corrections, all that kernels need not know apart. Detached."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grpo_kernels.loss.config import GRPOLossConfig
from grpo_kernels.loss.limits import largest_log_ratio
from grpo_kernels.loss.sequences import Sequences


def loss_weights(
    mask: Tensor,  # bool
    sequences: Sequences,
    config: GRPOLossConfig,
    num_items_in_batch: float | Tensor | None,
    loss_scale: float,
    dtype: torch.dtype,
) -> Tensor:  # [S], or [] where one is for all
    """The weight of a completion's tokens in the loss: all that tells one loss type from its siblings.

    Infinite where a mean is over no token, and then nobody reads it.
    """
    if config.aggregation == "token-mean":
        if num_items_in_batch is None or config.loss_type in ("bnpo", "ppo"):
            return token_mean(mask, dtype, loss_scale)
        if not isinstance(num_items_in_batch, Tensor):
            return mask.new_full((), loss_scale / max(float(num_items_in_batch), 1.0), dtype=dtype)
        items = num_items_in_batch.to(device=mask.device, dtype=dtype).reshape(())
        return _inverse(items.clamp(min=1), loss_scale)
    divisor = config.max_completion_length or 1 if config.aggregation == "seq-mean-token-sum-norm" else 1
    is_mean = config.aggregation == "seq-mean-token-mean"
    if config.loss_agg_mode is None and not is_mean:
        return mask.new_full((), loss_scale / (max(sequences.count, 1) * divisor), dtype=dtype)
    lengths = sequences.lengths(mask, dtype)
    if config.loss_agg_mode is None:
        return _inverse(lengths * sequences.count, loss_scale)
    count = (lengths > 0).sum(dtype=dtype)
    return _inverse(count * lengths if is_mean else count * divisor, loss_scale)


def token_mean(mask: Tensor, dtype: torch.dtype, loss_scale: float) -> Tensor:  # []
    """The weight of a token in a mean over the unmasked ones. Infinite where there are none, who would read it."""
    return _inverse(mask.sum(dtype=dtype), loss_scale)


def _inverse(divisors: Tensor, loss_scale: float) -> Tensor:
    weights = divisors.reciprocal_()
    return weights if loss_scale == 1 else weights.mul_(loss_scale)


def rollout_weights(
    old_logprobs: Tensor,  # [B, T] or [N], like the next two
    sampling_logprobs: Tensor,
    mask: Tensor,
    sequences: Sequences,
    config: GRPOLossConfig,
) -> Tensor:
    """``exp(l_old - l_sampling)`` of each token, or of its whole sequence, truncated (TIS) or masked (MIS, IcePop); or
    each token's, masked by its sequence's geometric mean.

    A token that the sampler did not score, NaN, is not corrected.
    """
    correction = config.rollout_correction or ""
    log_ratio = torch.where(mask, old_logprobs - sampling_logprobs, 0).nan_to_num(nan=0.0)
    if correction.startswith("sequence"):
        log_ratio = sequences.spread(sequences.sum(log_ratio))
    ratio = compared = log_ratio.clamp(max=largest_log_ratio(log_ratio.dtype)).exp()  # 0 times it is 0
    if correction == "geometric_mask":
        means = sequences.sum(log_ratio) / sequences.lengths(mask, log_ratio.dtype).clamp(min=1)
        compared = sequences.spread(means).exp()
    low = -math.inf if config.rollout_clip_min is None else config.rollout_clip_min
    high = math.inf if config.rollout_clip_max is None else config.rollout_clip_max
    if correction.endswith("truncate"):
        return ratio.clamp(low, high)
    return torch.where((compared < low) | (compared > high), 0, ratio)
