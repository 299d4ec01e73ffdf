"""Log-probabilities from hidden states in plain torch: the whole logits, then ``token_logprobs``."""

from __future__ import annotations

import torch
from torch import Tensor


def project(
    hidden_states: Tensor,  # [..., H]
    lm_head_weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    mask: Tensor | None,  # [...], bool
    compute_dtype: torch.dtype,
    logits_dtype: torch.dtype,
) -> Tensor:  # [..., V]
    """``h W^T + b``: inputs rounded to ``compute_dtype``, products summed in fp32 (fp64), rounded once."""
    wide = torch.float64 if compute_dtype == torch.float64 else torch.float32
    hidden = hidden_states.to(compute_dtype).to(wide)
    if mask is not None:
        hidden = torch.where(mask[..., None], hidden, 0)
    with torch.autocast(hidden.device.type, enabled=False):  # it would round inputs and products
        logits = hidden @ lm_head_weight.to(compute_dtype).to(wide).mT
    if bias is not None:
        logits = logits + bias.to(compute_dtype).to(wide)
    return logits.to(logits_dtype)
