"""Log-probabilities, the GRPO loss and divergences from logits, in plain torch. Each row of logits is one token's."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels.loss import reference as loss_reference
from grpo_kernels.loss.config import GRPOLossConfig
from grpo_kernels.loss.inputs import PolicyInputs
from grpo_kernels.ops.rows.transform import Comparison, Transform

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class TokenLogprobs(NamedTuple):
    """Per-token statistics of ``p = softmax(y)``, each shaped like the ids; None if not in ``outputs``.

    ``logprobs`` and ``entropy`` are in nats and differentiable; the others are not.
    """

    logprobs: Tensor
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None  # log sum_v p_v^2
    mean_logits: Tensor | None = None  # mean_v y_v
    is_top1: Tensor | None = None  # whether the token is the first with the largest logit


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
    """``log_softmax(y)[id]`` and the statistics in ``outputs``; 0 where masked."""
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


def grpo_loss(
    logits: Tensor,  # [..., V], cut to the tokens' positions
    ids: Tensor,  # [...]
    inputs: PolicyInputs,
    softcap: float | None,
    logit_scale: float,
    config: GRPOLossConfig,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, log-probabilities, entropy, and the metrics' partials."""
    out = token_logprobs(logits, ids, inputs.mask, config.temperature, softcap, logit_scale, ("entropy",))
    loss, partials = loss_reference.policy_loss(out.logprobs, inputs, out.entropy, config)
    return loss, out.logprobs, out.entropy, partials


class TokenDivergence(NamedTuple):
    """Per-token results in nats, shaped like the tokens, all differentiable. Log-probabilities are None without ids."""

    divergence: Tensor
    entropy: Tensor
    logprobs: Tensor | None


def _log_softmax(logits: Tensor, transform: Transform) -> Tensor:
    y = transform_logits(logits, transform.temperature, transform.softcap or None, transform.logit_scale)
    return y.log_softmax(-1)


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
    mixture = comparison.mixture
    log_policy = _log_softmax(logits, comparison.transform)
    log_p = _log_softmax(logits, comparison.divergence_transform)
    log_q = _log_softmax(reference_logits, comparison.reference_transform)
    p, q = log_p.exp(), log_q.exp()

    def expected(probability: Tensor, log_ratio: Tensor) -> Tensor:  # [..., V] -> [...]
        """``sum p log_ratio``. A term with probability 0 is 0, and so is its gradient."""
        is_possible = probability > 0
        return (torch.where(is_possible, probability, 0) * torch.where(is_possible, log_ratio, 0)).sum(-1)

    if mixture == 0:
        divergence = expected(q, log_q - log_p)
    elif mixture == 1:
        divergence = expected(p, log_p - log_q)
    else:
        is_possible = (p > 0) | (q > 0)  # logaddexp of two minus infinities has no derivative
        shares = (log_q + math.log(mixture), log_p + math.log1p(-mixture))
        log_m = torch.logaddexp(*(torch.where(is_possible, x, 0) for x in shares))
        divergence = mixture * expected(q, log_q - log_m) + (1 - mixture) * expected(p, log_p - log_m)
    entropy = -expected(log_policy.exp(), log_policy)
    logprobs = log_policy.gather(-1, ids.long()[..., None])[..., 0]
    if mask is not None:
        divergence, entropy, logprobs = (torch.where(mask, x, 0) for x in (divergence, entropy, logprobs))
    return TokenDivergence(divergence, entropy, logprobs)
