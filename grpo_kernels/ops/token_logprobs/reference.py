"""Token log-probabilities in plain torch, from logits already cut to the tokens' positions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class TokenLogprobs(NamedTuple):
    """Per-token statistics of ``p = softmax(y)``, each shaped like the ids; None unless asked for in ``outputs``.

    ``logprobs`` and ``entropy`` are in nats and differentiable; the others are not.
    """

    logprobs: Tensor
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None  # log sum_v p_v^2
    mean_logits: Tensor | None = None  # mean_v y_v
    is_top1: Tensor | None = None  # whether the token is the first of largest logit


def transform_logits(logits: Tensor, temperature: float, softcap: float | None, logit_scale: float) -> Tensor:
    """``softcap tanh(scale z / softcap) / temperature``; without a softcap, ``scale z / temperature``."""
    y = logits * logit_scale
    if softcap is not None:
        y = softcap * torch.tanh(y / softcap)
    return y / temperature


def token_logprobs(
    logits: Tensor,  # [..., V]
    ids: Tensor,  # [...]
    mask: Tensor | None,  # [...], bool
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    outputs: tuple[str, ...],
) -> TokenLogprobs:
    """``log_softmax(y)[id]`` and the statistics asked for; 0 where masked."""
    logits = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    if mask is not None:
        logits = torch.where(mask[..., None], logits, 0)
        ids = torch.where(mask, ids, 0)
    y = transform_logits(logits, temperature, softcap, logit_scale)
    log_p = y.log_softmax(-1)
    p = log_p.exp()

    def masked(values: Tensor) -> Tensor:
        return values if mask is None else torch.where(mask, values, 0)

    logprobs = masked(log_p.gather(-1, ids.long()[..., None])[..., 0])
    entropy = log_sum_sq_probs = mean_logits = is_top1 = None
    if "entropy" in outputs:
        entropy = masked(-(p * torch.where(p > 0, log_p, 0)).sum(-1))
    if "log_sum_sq_probs" in outputs:
        log_sum_sq_probs = masked((2 * log_p.detach()).logsumexp(-1))
    if "mean_logits" in outputs:
        mean_logits = masked(y.detach().mean(-1))
    if "is_top1" in outputs:
        is_top1 = y.argmax(-1) == ids
        is_top1 = is_top1 if mask is None else is_top1 & mask
    return TokenLogprobs(logprobs, entropy, log_sum_sq_probs, mean_logits, is_top1)
