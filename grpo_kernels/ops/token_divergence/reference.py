"""Divergences over the whole vocabulary in plain torch, from logits already cut to the tokens' positions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from grpo_kernels.ops.token_logprobs.reference import transform_logits

if TYPE_CHECKING:
    from grpo_kernels.ops.token_divergence.op import Comparison


class TokenDivergence(NamedTuple):
    """Per-token results, in nats, shaped like the tokens, all differentiable; log-probabilities only of given ids."""

    divergence: Tensor
    entropy: Tensor
    logprobs: Tensor | None


def _log_softmax(logits: Tensor, temperature: float, softcap: float, logit_scale: float) -> Tensor:
    return transform_logits(logits, temperature, softcap or None, logit_scale).log_softmax(-1)


def token_divergence(
    logits: Tensor,  # [..., V]
    reference_logits: Tensor,  # like logits
    ids: Tensor,  # [...]
    mask: Tensor | None,  # [...], bool
    comparison: Comparison,
) -> TokenDivergence:
    """The divergence of ``q``, the reference, and ``p``; 0 where masked. The reference is a constant.

    ``KL(q || p)`` at mixture 0, ``KL(p || q)`` at 1, else ``a KL(q || m) + (1 - a) KL(p || m)`` with the mixture ``a``
    and ``m = a q + (1 - a) p``: arXiv:2306.13649 eq. 1.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logits, reference_logits = logits.to(dtype), reference_logits.detach().to(dtype)
    if mask is not None:
        logits, reference_logits = (torch.where(mask[..., None], z, 0) for z in (logits, reference_logits))
        ids = torch.where(mask, ids, 0)
    mixture, temperature, softcap, scale, divergence_temperature, *reference = comparison
    log_policy = _log_softmax(logits, temperature, softcap, scale)
    log_p = _log_softmax(logits, divergence_temperature, softcap, scale)
    log_q = _log_softmax(reference_logits, divergence_temperature, *reference)
    p, q = log_p.exp(), log_q.exp()

    def expected(probability: Tensor, log_ratio: Tensor) -> Tensor:  # [..., V] -> [...]
        """``sum p log``; where a probability is 0 so is its term, and its gradient."""
        is_possible = probability > 0
        return (torch.where(is_possible, probability, 0) * torch.where(is_possible, log_ratio, 0)).sum(-1)

    if mixture == 0:
        divergence = expected(q, log_q - log_p)
    elif mixture == 1:
        divergence = expected(p, log_p - log_q)
    else:
        is_possible = (p > 0) | (q > 0)  # where neither is, logaddexp has no derivative
        shares = (log_q + math.log(mixture), log_p + math.log1p(-mixture))
        log_m = torch.logaddexp(*(torch.where(is_possible, x, 0) for x in shares))
        divergence = mixture * expected(q, log_q - log_m) + (1 - mixture) * expected(p, log_p - log_m)
    entropy = -expected(log_policy.exp(), log_policy)
    logprobs = log_policy.gather(-1, ids.long()[..., None])[..., 0]
    if mask is not None:
        divergence, entropy, logprobs = (torch.where(mask, x, 0) for x in (divergence, entropy, logprobs))
    return TokenDivergence(divergence, entropy, logprobs)
