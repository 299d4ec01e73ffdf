"""The GRPO loss from logits in plain torch: log-probabilities, then the policy loss."""

from __future__ import annotations

from torch import Tensor

from grpo_kernels.config import GRPOLossConfig
from grpo_kernels.ops.policy_loss import reference as policy
from grpo_kernels.ops.policy_loss.inputs import PolicyInputs
from grpo_kernels.ops.token_logprobs import reference as tokens


def grpo_loss(
    logits: Tensor,  # [..., V], cut to the tokens' positions
    ids: Tensor,  # [...]
    inputs: PolicyInputs,
    softcap: float | None,
    logit_scale: float,
    config: GRPOLossConfig,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, log-probabilities, entropy, and the metrics' partials."""
    out = tokens.token_logprobs(logits, ids, inputs.mask, config.temperature, softcap, logit_scale, ("entropy",))
    loss, partials = policy.policy_loss(out.logprobs, inputs, out.entropy, config)
    return loss, out.logprobs, out.entropy, partials
