"""The GRPO loss and its gradient, from logits in one pass."""

from grpo_kernels.ops.grpo_loss.op import GRPOLossOutput, grpo_loss

__all__ = ["GRPOLossOutput", "grpo_loss"]
