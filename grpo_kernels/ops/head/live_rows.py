"""Which tokens of a loss may have a gradient, before and after their logits are known."""

from __future__ import annotations

from torch import Tensor

from grpo_kernels.loss.fields import TokenFields
from grpo_kernels.loss.options import Param
from grpo_kernels.ops.head.selection import is_capturing


def may_be_live(has_kl: bool, fields: TokenFields) -> Tensor:  # [N]
    """The tokens whose coefficient may be nonzero, judged before their logits are known."""
    live = fields.has_policy_term()
    if has_kl:
        live = live | (fields.expand_to_tokens(fields.weights) != 0)
    return live if fields.entropy_weights is None else live | (fields.expand_to_tokens(fields.entropy_weights) != 0)


def may_be_clipped(has_kl: bool, params: list[float], fields: TokenFields) -> bool:
    """Whether clipping may make a token's coefficient 0, once its ratio is known."""
    is_off_policy = fields.old_logprobs is not None or params[Param.DELTA] < 1
    return is_off_policy and not has_kl and fields.entropy_weights is None and not is_capturing(fields.mask.device)
