"""Generalised advantage estimation in plain torch: the recurrence as the paper has it, one token after another."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    rewards: Tensor,  # [N], completions end to end
    values: Tensor,  # [N]
    mask: Tensor,  # [N] bool
    offsets: Tensor,  # [S + 1]
    gamma: float,
    lam: float,
) -> Tensor:  # [N]
    """``A_t = delta_t + gamma lam A_(t+1)``, ``delta_t = r_t + gamma V_(t+1) - V_t``: arXiv:1506.02438 eq. 16.

    ``t + 1`` is the next unmasked token of the completion; past the last, both are 0.
    """
    position = torch.arange(mask.shape[0], device=mask.device)
    remaining = offsets[1:].clone()  # one past the token that each completion looks at next
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
