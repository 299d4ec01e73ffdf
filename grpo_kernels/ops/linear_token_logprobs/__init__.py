"""Log-probability and entropy of sampled tokens, from hidden states: logits never exist as a whole."""

from grpo_kernels.ops.linear_token_logprobs.op import linear_token_logprobs

__all__ = ["linear_token_logprobs"]
