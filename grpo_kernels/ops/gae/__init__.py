"""Generalised advantage estimation."""

from grpo_kernels.ops.gae.op import GAEOutput, gae

__all__ = ["GAEOutput", "gae"]
