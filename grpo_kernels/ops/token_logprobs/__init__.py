"""Log-probability and entropy of sampled tokens, from logits."""

from grpo_kernels.ops.token_logprobs.op import TokenLogprobs, token_logprobs

__all__ = ["TokenLogprobs", "token_logprobs"]
