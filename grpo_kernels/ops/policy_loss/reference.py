"""The policy loss in plain torch: the equations as they stand in the papers, gradients by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels.config import GRPOLossConfig
from grpo_kernels.ops.policy_loss.inputs import PolicyInputs


def policy_loss(
    logprobs: Tensor,  # [B, T] or [N]
    inputs: PolicyInputs,
    entropy: Tensor | None,  # like logprobs
    config: GRPOLossConfig,
) -> tuple[Tensor, Tensor]:
    """``sum w (-S + beta k) - entropy bonus``, and the metrics' partials ``[len(Partial)]``."""
    mask = inputs.mask

    def unmasked(values: Tensor) -> Tensor:  # before any exp: inf * 0 is NaN
        return torch.where(mask, values, 0)

    logprobs = unmasked(logprobs)
    log_ratio = importance_log_ratio(logprobs, inputs, config)
    ratio = log_ratio.exp()
    advantages = unmasked(inputs.advantages)
    # no advantage, no policy term: not even of an infinite ratio
    bounded = torch.where(advantages == 0, 0, log_ratio).exp()
    loss = (-inputs.policy_weights * surrogate(bounded, advantages, config)).sum()
    kl = None
    if inputs.ref_logprobs is not None:
        kl = kl_penalty(logprobs, unmasked(inputs.ref_logprobs), ratio, config)
        loss = loss + (config.beta * inputs.kl_weights * kl).sum()
    if inputs.entropy_weights is not None and entropy is not None:
        loss = loss - (inputs.entropy_weights * unmasked(entropy)).sum()
    return loss, metric_partials(ratio, advantages, kl, entropy, inputs, config)


def importance_log_ratio(logprobs: Tensor, inputs: PolicyInputs, config: GRPOLossConfig) -> Tensor:
    """``l - l_old``; at sequence level ``mean_t(l - l_old)``, GSPO eq. 7 (arXiv:2507.18071)."""
    mask, sequences = inputs.mask, inputs.sequences
    old = logprobs.detach() if inputs.old_logprobs is None else inputs.old_logprobs
    log_ratio = torch.where(mask, logprobs - old, 0)
    if config.importance_sampling_level == "sequence":
        lengths = sequences.sum(mask.to(logprobs.dtype)).clamp(min=1)
        log_ratio = torch.where(mask, sequences.spread(sequences.sum(log_ratio) / lengths), 0)
    return log_ratio


def surrogate(ratio: Tensor, advantages: Tensor, config: GRPOLossConfig) -> Tensor:
    """``min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A)``, with ``rho`` bounded by ``delta`` in the first term."""
    low, high = config.ratio_bounds
    unclipped = ratio if config.delta is None else ratio.clamp(max=config.delta)
    return torch.minimum(unclipped * advantages, ratio.clamp(low, high) * advantages)


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, ratio: Tensor, config: GRPOLossConfig) -> Tensor:
    """k3, ``exp(l_ref - l) - (l_ref - l) - 1``; times the importance ratio where that bias is to be corrected."""
    difference = ref_logprobs - logprobs
    kl = torch.expm1(difference) - difference
    return kl * ratio if config.use_bias_correction_kl else kl


@torch.no_grad()
def metric_partials(
    ratio: Tensor,
    advantages: Tensor,
    kl: Tensor | None,
    entropy: Tensor | None,
    inputs: PolicyInputs,
    config: GRPOLossConfig,
) -> Tensor:  # [len(Partial)]
    """What ``PolicyMetrics`` reads, in the order of ``Partial``."""
    mask, sequences = inputs.mask, inputs.sequences
    low, high = config.ratio_bounds
    bounded = ratio if config.delta is None else ratio.clamp(max=config.delta)
    is_low = mask & (bounded < low) & (advantages < 0)
    is_high = mask & (bounded > high) & (advantages > 0)
    dtype = ratio.dtype
    tokens = sequences.sum(mask.to(dtype))
    low_share = sequences.sum(is_low.to(dtype)) / tokens.clamp(min=1)
    high_share = sequences.sum(is_high.to(dtype)) / tokens.clamp(min=1)
    per_sequence = config.importance_sampling_level == "sequence"
    # at token level a sequence without a token has no share; at sequence level it still has a ratio, of 1
    has_share = torch.ones_like(tokens, dtype=torch.bool) if per_sequence else tokens > 0
    zero = ratio.new_zeros(())
    return torch.stack(
        [
            tokens.sum(),
            zero + sequences.count if per_sequence else tokens.sum(),
            zero if kl is None else torch.where(mask, kl, 0).sum(),
            zero if entropy is None else torch.where(mask, entropy, 0).sum().to(dtype),
            low_share.sum() if per_sequence else is_low.sum().to(dtype),
            high_share.sum() if per_sequence else is_high.sum().to(dtype),
            _or_none(torch.where(has_share, low_share, torch.inf), torch.inf).amin(),
            _or_none(torch.where(has_share, high_share, -torch.inf), -torch.inf).amax(),
        ]
    )


def _or_none(shares: Tensor, none: float) -> Tensor:  # [S] -> [S + 1]
    """The shares and a value that no share is compared to: a batch may hold no sequence."""
    return torch.cat([shares, shares.new_full((1,), none)])
