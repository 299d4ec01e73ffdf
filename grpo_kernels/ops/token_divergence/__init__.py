"""Exact divergence between two next-token distributions, over the whole vocabulary."""

from grpo_kernels.ops.token_divergence.op import token_divergence
from grpo_kernels.ops.token_divergence.reference import TokenDivergence

__all__ = ["TokenDivergence", "token_divergence"]
