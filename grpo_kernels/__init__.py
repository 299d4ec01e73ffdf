"""Fused kernels for GRPO: from logits, or hidden states, to the loss and its gradient in one pass."""

from typing import Any

from grpo_kernels import presets
from grpo_kernels.adaptive_entropy import AdaptiveEntropy
from grpo_kernels.backends import BACKENDS
from grpo_kernels.device_values import check_device_values
from grpo_kernels.loss.config import GRPOLossConfig
from grpo_kernels.loss.metrics import PolicyMetrics
from grpo_kernels.loss.sequences import Sequences
from grpo_kernels.loss.weights import rollout_weights
from grpo_kernels.modules import GRPOLoss, LinearGRPOLoss
from grpo_kernels.objectives import distillation_loss, sft_loss
from grpo_kernels.ops.head.linear_grpo_loss import linear_grpo_loss
from grpo_kernels.ops.head.linear_token_divergence import linear_token_divergence
from grpo_kernels.ops.head.linear_token_logprobs import linear_token_logprobs
from grpo_kernels.ops.rows.grpo_loss import GRPOLossOutput, grpo_loss
from grpo_kernels.ops.rows.reference import TokenDivergence, TokenLogprobs
from grpo_kernels.ops.rows.token_divergence import token_divergence
from grpo_kernels.ops.rows.token_logprobs import token_logprobs
from grpo_kernels.ops.tokens.gae import GAEOutput, gae
from grpo_kernels.ops.tokens.group_advantages import group_advantages
from grpo_kernels.ops.tokens.policy_loss import PolicyLossOutput, policy_loss
from grpo_kernels.preferences import PreferenceOutput, dpo_loss, reward_model_loss
from grpo_kernels.reward_shaping import kl_penalized_rewards, mask_truncated
from grpo_kernels.version import __version__

__all__ = [
    "BACKENDS",
    "AdaptiveEntropy",
    "GAEOutput",
    "GRPOLoss",
    "GRPOLossConfig",
    "GRPOLossOutput",
    "LinearGRPOLoss",
    "PolicyLossOutput",
    "PolicyMetrics",
    "PreferenceOutput",
    "Sequences",
    "TokenDivergence",
    "TokenLogprobs",
    "__version__",
    "apply_grpo_kernels_to_trl",
    "check_device_values",
    "distillation_loss",
    "dpo_loss",
    "gae",
    "group_advantages",
    "grpo_loss",
    "kl_penalized_rewards",
    "linear_grpo_loss",
    "linear_token_divergence",
    "linear_token_logprobs",
    "mask_truncated",
    "policy_loss",
    "presets",
    "reward_model_loss",
    "rollout_weights",
    "sft_loss",
    "token_divergence",
    "token_logprobs",
]


def apply_grpo_kernels_to_trl(**options: Any) -> Any:
    """Runs TRL's heads through these kernels from now on: ``grpo_kernels.integrations.trl.apply``.

    Example:
        >>> with apply_grpo_kernels_to_trl(backend="auto") as applied:
        ...     applied.counts
        Counts(hits=0, misses=0, rows=0, live=0)

    Args:
        **options: ``speculate``, ``max_logits_bytes``, ``workspace_bytes``, ``backend``: see there.

    Raises:
        ImportError: TRL is not installed, or has no fused head.
        RuntimeError: TRL's head is not as expected.
    """
    from grpo_kernels.integrations.trl import apply  # which imports TRL

    return apply(**options)
