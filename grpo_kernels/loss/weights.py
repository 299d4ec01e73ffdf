"""The weights of tokens: the means of loss types, and rollout corrections. Kernels see only these weights. Detached."""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor

from grpo_kernels.loss.aggregation import AGGREGATIONS, TokenCounts
from grpo_kernels.loss.config import GRPOLossConfig
from grpo_kernels.loss.limits import largest_log_ratio
from grpo_kernels.loss.sequences import Sequences
from grpo_kernels.named_arguments import check_keywords


def loss_weights(
    mask: Tensor,  # bool
    sequences: Sequences,
    config: GRPOLossConfig,
    num_items_in_batch: float | Tensor | None,
    loss_scale: float,
    dtype: torch.dtype,
) -> Tensor:  # [S], or [] if all tokens have the same
    """The weight of a completion's tokens in the loss, which contains the loss type's mean.

    A mean over no token has an infinite weight, which no token reads.
    """
    takes_items = divides_by_items(config)
    if takes_items and isinstance(num_items_in_batch, Tensor):
        items = num_items_in_batch.to(device=mask.device, dtype=dtype).reshape(())
        return torch.div(loss_scale, items.clamp(min=1))
    if takes_items and num_items_in_batch is not None:
        return mask.new_full((), loss_scale / max(float(num_items_in_batch), 1.0), dtype=dtype)
    counts_empty = config.loss_agg_mode is None
    counts = TokenCounts(mask, sequences, counts_empty, config.max_completion_length, dtype)
    divisors = AGGREGATIONS[config.aggregation](counts)
    factor = loss_scale / math.prod([x for x in divisors if not isinstance(x, Tensor)])
    tensors = [x for x in divisors if isinstance(x, Tensor)]
    if not tensors:
        return mask.new_full((), factor, dtype=dtype)
    return torch.div(factor, reduce(torch.mul, tensors))  # one launch; a number over a tensor as `/` writes it is two


def divides_by_items(config: GRPOLossConfig) -> bool:
    """Whether the loss type's mean divides by ``num_items_in_batch``, where it is given."""
    return config.aggregation == "token-mean" and config.loss_type not in ("bnpo", "ppo")


def token_mean(mask: Tensor, dtype: torch.dtype, loss_scale: float) -> Tensor:  # []
    """The weight of a token in a mean over the unmasked ones. Infinite if there are none."""
    return torch.div(loss_scale, mask.sum(dtype=dtype))


@check_keywords(GRPOLossConfig)
def rollout_weights(
    old_logprobs: Tensor,  # [B, T] or [N], like the next two
    sampling_logprobs: Tensor,
    mask: Tensor,
    sequences: Sequences,
    config: GRPOLossConfig,
) -> Tensor:
    """``exp(l_old - l_sampling)`` of each token or of its whole sequence, truncated (TIS) or masked (MIS, IcePop).

    Example:
        >>> old, mask = torch.tensor([[-1.0, -1.0]]), torch.ones(1, 2, dtype=torch.bool)
        >>> config = GRPOLossConfig(rollout_correction="token_truncate", rollout_clip_max=2.0)
        >>> rollout_weights(old, torch.tensor([[-1.0, -3.0]]), mask, Sequences.of(old, None), config)
        tensor([[1., 2.]])

    "geometric_mask" masks each token's ratio by the geometric mean of its sequence. A token that the sampler did not
    score (NaN) is not corrected.
    """
    mask = mask if mask.dtype == torch.bool else mask != 0
    correction = config.rollout_correction or ""
    log_ratio = torch.where(mask, old_logprobs - sampling_logprobs, 0).nan_to_num(nan=0.0)
    if correction.startswith("sequence"):
        log_ratio = sequences.spread(sequences.sum(log_ratio))
    ratio = compared = log_ratio.clamp(max=largest_log_ratio(log_ratio.dtype)).exp()  # finite, so that 0 times it is 0
    if correction == "geometric_mask":
        means = sequences.sum(log_ratio) / sequences.lengths(mask, log_ratio.dtype).clamp(min=1)
        compared = sequences.spread(means).exp()
    low = -math.inf if config.rollout_clip_min is None else config.rollout_clip_min
    high = math.inf if config.rollout_clip_max is None else config.rollout_clip_max
    if correction.endswith("truncate"):
        return ratio.clamp(low, high)
    return torch.where((compared < low) | (compared > high), 0, ratio)
