"""The losses as ``nn.Module``, which holds their configuration."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from grpo_kernels.loss.config import GRPOLossConfig
from grpo_kernels.ops.head.linear_grpo_loss import linear_grpo_loss
from grpo_kernels.ops.rows.grpo_loss import GRPOLossOutput, grpo_loss


class GRPOLoss(nn.Module):
    """``grpo_loss`` with a stored configuration and default keyword arguments.

    Args:
        config: The loss.
        **options: Any other keyword arguments of ``grpo_loss``. Those of a call take precedence.

    Example:
        >>> loss = GRPOLoss(GRPOLossConfig(beta=0.0, epsilon_high=0.28), inplace=True)
    """

    def __init__(self, config: GRPOLossConfig | None = None, **options: Any) -> None:
        super().__init__()
        self.config = config or GRPOLossConfig()
        self.options = options

    def forward(
        self,
        logits: Tensor,  # [B, T, V] or [B, T + 1, V]; packed [N, V]
        completion_ids: Tensor,  # [B, T]; packed [N]
        advantages: Tensor | None,  # [B] or [B, T]; packed [S] or [N]
        completion_mask: Tensor,  # like completion_ids
        **arguments: Any,
    ) -> GRPOLossOutput:
        """As ``grpo_loss``."""
        options = {**self.options, **arguments}
        return grpo_loss(logits, completion_ids, advantages, completion_mask, config=self.config, **options)

    def extra_repr(self) -> str:
        return f"{self.config}"


class LinearGRPOLoss(GRPOLoss):
    """``linear_grpo_loss`` with a stored configuration and default keyword arguments, like ``GRPOLoss``."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,  # [B, T, H] or [B, T + 1, H]; packed [N, H]
        lm_head_weight: Tensor,  # [V, H]
        completion_ids: Tensor,  # [B, T]; packed [N]
        advantages: Tensor | None,  # [B] or [B, T]; packed [S] or [N]
        completion_mask: Tensor,  # like completion_ids
        **arguments: Any,
    ) -> GRPOLossOutput:
        """As ``linear_grpo_loss``."""
        options = {**self.options, **arguments}
        return linear_grpo_loss(
            hidden_states, lm_head_weight, completion_ids, advantages, completion_mask, config=self.config, **options
        )
