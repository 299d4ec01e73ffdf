"""Group-normalised advantages."""

from grpo_kernels.ops.group_advantages.op import group_advantages

__all__ = ["group_advantages"]
