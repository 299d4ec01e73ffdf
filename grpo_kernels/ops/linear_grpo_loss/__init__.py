"""The GRPO loss and its gradient, from hidden states: logits never exist as a whole."""

from grpo_kernels.ops.linear_grpo_loss.op import linear_grpo_loss

__all__ = ["linear_grpo_loss"]
