"""GRPO as a loop writer would spell it in PyTorch: the baseline that needs no package."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """From logits ``[B, T, V]`` and ids ``[B, T]``, by a whole fp32 log-softmax."""
    return torch.log_softmax(logits.float(), -1).gather(-1, ids[..., None])[..., 0]


def loss_of_logprobs(
    logprobs: Tensor,  # [B, T]
    old: Tensor,  # [B, T]
    advantages: Tensor,  # [B]
    mask: Tensor,  # [B, T]
) -> Tensor:
    """The clipped loss at epsilon 0.2, averaged over tokens: what a provider of log-probabilities leaves to torch."""
    ratio = torch.exp(logprobs - old)
    advantages = advantages[:, None]
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return -(surrogate * mask).sum() / mask.sum()


def naive_policy_step(
    logprobs: Tensor,  # [B, T]
    old: Tensor,  # [B, T]
    ref: Tensor,  # [B, T]
    mask: Tensor,  # [B, T]
    rewards: Tensor,  # [B]
    num_generations: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Advantages of groups, the clipped loss with a k3 KL at beta 0.04, and the metrics that TRL logs of them."""
    groups = rewards.view(-1, num_generations)
    advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).view(-1, 1)
    ratio = torch.exp(logprobs - old)
    kl = torch.exp(ref - logprobs) - (ref - logprobs) - 1
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    count = mask.sum()
    loss = ((-surrogate + 0.04 * kl) * mask).sum() / count
    low = ((ratio < 0.8) & (advantages < 0)).float() * mask
    high = ((ratio > 1.2) & (advantages > 0)).float() * mask
    metrics = {"kl": (kl.detach() * mask).sum() / count, "clip_ratio/region_mean": (low + high).sum() / count}
    for name, clipped in (("low", low), ("high", high)):
        metrics[f"clip_ratio/{name}_mean"] = clipped.sum() / count
        metrics[f"clip_ratio/{name}_extreme"] = (clipped.sum(1) / mask.sum(1).clamp(min=1)).amax()
    return loss, metrics
