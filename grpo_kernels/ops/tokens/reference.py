"""Advantages in plain torch.

Group-normalised: DeepSeekMath section 4.1.2, with TRL's treatment of missing rewards. Generalised advantage estimation:
the recurrence of the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(
    rewards: Tensor,  # [B, K]
    weights: Tensor,  # [K]
    num_generations: int,
    scale_rewards: str,
    aggregation: str,
    eps: float,
) -> Tensor:  # [B]
    """``(r - mean_group r) / (std_group r + eps)``; NaN marks a missing reward. See the public function."""
    missing = rewards.isnan()
    groups = rewards.shape[0] // num_generations
    if aggregation == "normalize_then_sum":
        rewards = torch.stack(
            [_normalize(r.view(groups, -1), "group", eps).reshape(-1) for r in rewards.unbind(-1)], dim=-1
        )
    total = weighted_sum(rewards, weights, missing)
    if aggregation == "normalize_then_sum":
        advantages = _normalize(total.view(1, -1), "group", eps, mean_is_zero=True)
    else:
        advantages = _normalize(total.view(groups, -1), scale_rewards, eps)
    return advantages.reshape(-1).nan_to_num(nan=0.0)


def weighted_sum(rewards: Tensor, weights: Tensor, missing: Tensor) -> Tensor:  # [B, K], [K], [B, K] -> [B]
    """The sum over the reward functions, without missing rewards; NaN if all are missing.

    It is fp64 (not on MPS, which has none) and rounded once, so that equal parts give equal sums in any order.
    """
    wide = rewards.dtype if rewards.device.type == "mps" else torch.float64
    total = torch.where(missing, 0, rewards.to(wide) * weights.to(wide)).sum(-1).to(rewards.dtype)
    return torch.where(missing.all(-1), torch.nan, total)


def _normalize(
    rewards: Tensor,  # [groups, G]
    scale_rewards: str,
    eps: float,
    mean_is_zero: bool = False,
) -> Tensor:  # [groups, G]
    """Centred on the group's mean, and divided by the unbiased deviation of the group or of the whole tensor.

    ``mean_is_zero`` means that the mean is 0 up to rounding, as that of sums of normalised rewards over a batch.
    """
    centred = rewards if mean_is_zero else rewards - rewards.nanmean(-1, keepdim=True)
    centred = torch.where(all_equal(rewards), 0, centred)
    if scale_rewards == "none":
        return centred
    if scale_rewards == "batch":
        std = nanstd(rewards.reshape(1, -1))
    else:
        std = nanstd(rewards)
    return centred / (std + eps)


def all_equal(rewards: Tensor) -> Tensor:  # [groups, G] -> [groups, 1]
    """Whether all rewards of a group that are not NaN are equal."""
    low = rewards.nan_to_num(nan=torch.inf).amin(-1, keepdim=True)
    high = rewards.nan_to_num(nan=-torch.inf).amax(-1, keepdim=True)
    return low >= high


def nanstd(values: Tensor) -> Tensor:  # [groups, G] -> [groups, 1]
    """Unbiased deviation of the values that are not NaN; 0 if there are fewer than two."""
    present = ~values.isnan()
    count = present.sum(-1, keepdim=True)
    deviation = torch.where(present, values - values.nanmean(-1, keepdim=True), 0)
    return (deviation.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()


def gae(
    rewards: Tensor,  # [N], completions end to end
    values: Tensor,  # [N]
    mask: Tensor,  # [N] bool
    offsets: Tensor,  # [S + 1]
    gamma: float,
    lam: float,
) -> Tensor:  # [N]
    """``A_t = delta_t + gamma lam A_(t+1)``, ``delta_t = r_t + gamma V_(t+1) - V_t``: arXiv:1506.02438 eq. 16.

    ``t + 1`` is the next unmasked token of the completion; ``A`` and ``V`` after the last one are 0.
    """
    position = torch.arange(mask.shape[0], device=mask.device)
    remaining = offsets[1:].clone()  # one past each completion's next token
    advantages = torch.zeros_like(values)
    next_value, next_advantage = (values.new_zeros(offsets.shape[0] - 1) for _ in range(2))
    steps = int((offsets[1:] - offsets[:-1]).max()) if position.numel() else 0
    for _ in range(steps):
        remaining = remaining - 1
        inside = remaining >= offsets[:-1]
        at = torch.where(inside, remaining, 0)
        live = inside & mask[at]
        delta = rewards[at] + gamma * next_value - values[at]
        advantage = delta + gamma * lam * next_advantage
        next_advantage = torch.where(live, advantage, next_advantage)
        next_value = torch.where(live, values[at], next_value)
        advantages[at[live]] = advantage[live]
    return advantages
