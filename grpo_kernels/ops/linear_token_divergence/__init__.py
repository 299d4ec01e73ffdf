"""Exact divergence between two next-token distributions, from hidden states: logits never exist as a whole."""

from grpo_kernels.ops.linear_token_divergence.op import linear_token_divergence

__all__ = ["linear_token_divergence"]
