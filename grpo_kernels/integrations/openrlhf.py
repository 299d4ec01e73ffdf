"""OpenRLHF's two functions over logits, by its names: ``openrlhf.models.utils`` of release 0.11.

Written against the functions as they are documented; OpenRLHF itself does not install on a machine without a GPU, so
that its own package is not part of the tests. To use them, replace the names where its actor looks them up:

    import openrlhf.models.actor as actor
    from grpo_kernels.integrations import openrlhf as kernels
    actor.log_probs_from_logits, actor.compute_entropy = kernels.log_probs_from_logits, kernels.compute_entropy
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels.ops.rows.token_logprobs import token_logprobs

__all__ = ["compute_entropy", "log_probs_from_logits"]


def log_probs_from_logits(
    logits: Tensor,  # [B, T, V]
    labels: Tensor,  # [B, T]
    temperature: float = 1.0,
) -> Tensor:  # [B, T]
    """Log-probability of each label, in fp32. The logits stay as they are: OpenRLHF's own divides them in place."""
    return token_logprobs(logits, labels, temperature=temperature).logprobs


def compute_entropy(logits: Tensor) -> Tensor:  # [B, T, V] -> [B, T]
    """Entropy of each position, in nats, of logits as they are given; differentiable."""
    ids = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_logprobs(logits, ids, outputs=("entropy",)).entropy  # type: ignore[return-value]
