"""The per-token policy loss, its reduction and its metrics, from log-probabilities."""

from grpo_kernels.ops.policy_loss.op import PolicyLossOutput, policy_loss

__all__ = ["PolicyLossOutput", "policy_loss"]
