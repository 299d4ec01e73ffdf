"""GRPO as a loop writer would spell it in PyTorch: the baseline that needs no package."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_grpo_loss(
    logits: Tensor,  # [B, T, V]
    ids: Tensor,  # [B, T]
    advantages: Tensor,  # [B]
    mask: Tensor,  # [B, T]
    old_logprobs: Tensor,  # [B, T]
) -> Tensor:
    """The clipped loss at epsilon 0.2, averaged over tokens, from a whole fp32 log-softmax."""
    logprobs = torch.log_softmax(logits.float(), -1).gather(-1, ids[..., None])[..., 0]
    ratio = torch.exp(logprobs - old_logprobs)
    surrogate = torch.minimum(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None])
    return -(surrogate * mask).sum() / mask.sum()
