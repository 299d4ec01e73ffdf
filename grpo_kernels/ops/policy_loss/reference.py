"""The policy loss in plain torch: the equations as they stand in the papers, gradients by autograd.

Where a ratio is past the largest number, or 0, values and gradients are the limits. The derivative of the KL is written
down, for autograd would multiply 0 by infinity or subtract infinity from itself.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from grpo_kernels.config import GRPOLossConfig
from grpo_kernels.ops.device_values import note_infinite
from grpo_kernels.ops.policy_loss.inputs import PolicyInputs
from grpo_kernels.ops.policy_loss.weights import settle
from grpo_kernels.options import Level, Surrogate


def policy_loss(
    logprobs: Tensor,  # [B, T] or [N]
    inputs: PolicyInputs,
    entropy: Tensor | None,  # like logprobs
    config: GRPOLossConfig,
) -> tuple[Tensor, Tensor]:
    """``sum w (-S + beta k) - entropy bonus``, and the metrics' partials ``[len(Partial)]``."""
    inputs, of_weights = settle(inputs, logprobs, entropy, config)
    mask = inputs.mask

    def unmasked(values: Tensor) -> Tensor:  # before any exp: inf * 0 is NaN
        return torch.where(mask, values, 0)

    logprobs = unmasked(logprobs)
    advantages = unmasked(inputs.advantages)
    log_ratio = importance_log_ratio(logprobs, advantages, inputs, config)
    ratio = log_ratio.exp()
    # no advantage or weight, no policy term: not even of an infinite ratio
    bounded = torch.where((advantages == 0) | (inputs.policy_weights == 0), 0, log_ratio)
    bounded = bounded_log_ratio(bounded, advantages, config).exp()
    losses = product(-inputs.policy_weights, surrogate(bounded, logprobs, advantages, config))
    kl = None
    if inputs.ref_logprobs is not None:
        kl = kl_penalty(logprobs, unmasked(inputs.ref_logprobs), log_ratio, inputs, config)
        losses = losses + product(config.penalty.weight * inputs.kl_weights, kl)
    note_infinite(losses)
    loss = losses.sum()
    if inputs.entropy_weights is not None and entropy is not None:
        loss = loss - (inputs.entropy_weights * unmasked(entropy)).sum()
    if config.level == Level.GEOMETRIC:  # what is clipped is a token's
        ratio = token_log_ratio(logprobs, inputs, config).exp()
    partials = metric_partials(ratio, advantages, kl, entropy, inputs, config)
    return loss, partials if of_weights is None else torch.cat([partials, of_weights])


def token_log_ratio(logprobs: Tensor, inputs: PolicyInputs, config: GRPOLossConfig) -> Tensor:
    """``l - l_old``."""
    log_ratio = inputs.log_ratio(logprobs)
    return _clamped(log_ratio, config.log_ratio_clamp) if config.level == Level.TOKEN else log_ratio


def importance_log_ratio(logprobs: Tensor, advantages: Tensor, inputs: PolicyInputs, config: GRPOLossConfig) -> Tensor:
    """``l - l_old``; at sequence level ``mean_t(l - l_old)``, GSPO eq. 7 (arXiv:2507.18071).

    GSPO-token, eq. 13: the same value with each token's own gradient. GMPO, eq. 4 (arXiv:2507.20673): the mean of
    log-ratios clipped where a ratio would leave the range on the side that its advantage rewards.
    """
    log_ratio = token_log_ratio(logprobs, inputs, config)
    if config.level == Level.TOKEN:
        return log_ratio
    mask, sequences = inputs.mask, inputs.sequences
    summed = log_ratio
    if config.level == Level.GEOMETRIC:
        low, high = (math.log(bound) for bound in config.ratio_bounds)
        summed = torch.where(advantages > 0, log_ratio.clamp(max=high), log_ratio.clamp(min=low))
        summed = torch.where(mask, summed, 0)
    lengths = sequences.sum(mask.to(logprobs.dtype)).clamp(min=1)
    mean = torch.where(mask, sequences.spread(sequences.sum(summed) / lengths), 0)
    if config.level == Level.SEQUENCE_TOKEN:
        own = torch.where(logprobs.isinf(), 0, logprobs)  # its ratio is 0, and has no gradient
        return mean.detach() + (own - own.detach())
    return mean


def bounded_log_ratio(log_ratio: Tensor, advantages: Tensor, config: GRPOLossConfig) -> Tensor:
    """The log-ratio, held where its exponential is finite if the surrogate is constant from there on."""
    is_constant = torch.full_like(log_ratio, config.surrogate == Surrogate.SAPO, dtype=torch.bool)
    if config.surrogate == Surrogate.CLIP and config.level != Level.GEOMETRIC:
        is_clipped = (advantages > 0) & math.isfinite(config.ratio_bounds[1])
        is_constant = torch.full_like(is_clipped, True) if config.delta is not None else is_clipped
    largest = math.floor(math.log(torch.finfo(log_ratio.dtype).max))
    return torch.where(is_constant, log_ratio.clamp(max=largest), log_ratio)


def product(weight: Tensor, values: Tensor) -> Tensor:
    """The product, to the limit: what is 0 leaves nothing of what is infinite."""
    is_nothing = ((weight == 0) & values.isinf()) | (weight.isinf() & (values == 0))
    return torch.where(is_nothing, 0, weight * torch.where(is_nothing, 0, values))


def surrogate(ratio: Tensor, logprobs: Tensor, advantages: Tensor, config: GRPOLossConfig) -> Tensor:
    """The objective of a token, to be maximised.

    - ``min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A)``, with ``rho`` bounded by ``delta`` in the first term;
    - CISPO, eq. 4 (arXiv:2506.13585): ``sg[clip(rho)] A l``;
    - SAPO, eq. 6 (arXiv:2511.20347): ``4 / tau sigmoid(tau (rho - 1)) A``;
    - ``A l``.
    """
    low, high = config.ratio_bounds
    if config.surrogate == Surrogate.CISPO:
        return product(ratio.detach().clamp(low, high) * advantages, logprobs)
    if config.surrogate == Surrogate.SAPO:
        tau = torch.where(
            advantages > 0, config.sapo_temperature_pos, torch.full_like(advantages, config.sapo_temperature_neg)
        )
        return torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages
    if config.surrogate == Surrogate.LOGPROB:
        return advantages * logprobs
    unclipped = ratio if config.delta is None else ratio.clamp(max=config.delta)
    clipped = unclipped if config.level == Level.GEOMETRIC else ratio.clamp(low, high)
    return torch.minimum(unclipped * advantages, clipped * advantages)


def kl_penalty(
    logprobs: Tensor, ref_logprobs: Tensor, log_ratio: Tensor, inputs: PolicyInputs, config: GRPOLossConfig
) -> Tensor:
    """The estimate of the KL divergence, with ``d = l - l_ref``; times the importance ratio where that is asked for.

    http://joschu.net/blog/kl-approx.html; straight-through, the value of one with the gradient of k2;
    importance-weighted, times ``exp(l - sg[l])`` (arXiv:2506.09477).
    """
    penalty = config.penalty
    difference = logprobs - ref_logprobs
    d = _clamped(difference, config.log_ratio_clamp)
    estimate = kl_estimate(d, penalty.estimator)
    slope, weighted_slope = kl_slopes(d, penalty.estimator)
    kl = _clamped(estimate, config.kl_clamp)
    is_held = d != difference
    is_clamped = (is_held | (kl != estimate)) & ~estimate.isnan()
    slope = torch.where(is_clamped, 0, weighted_slope if penalty.gradient == "importance_weighted" else slope)
    if penalty.gradient == "straight_through":
        slope = torch.where(is_held, 0, d)
    if not penalty.is_bias_corrected:
        return _WithDerivatives.apply(kl, log_ratio, torch.zeros_like(kl), logprobs, slope)
    ratio = log_ratio.exp()
    value, slope = product(ratio, kl), product(ratio, slope)
    joint = log_ratio - d
    if config.level == Level.TOKEN:
        is_own = log_ratio == inputs.log_ratio(logprobs)
        old = logprobs if inputs.old_logprobs is None else inputs.old_logprobs
        joint = torch.where(is_own & ~is_held, torch.where(inputs.mask, ref_logprobs - old, 0), joint)
    else:
        is_own = torch.full_like(inputs.mask, config.level == Level.SEQUENCE_TOKEN)
    if penalty.estimator == "k3":  # exp(-d) may be past the largest number while the ratio is below the least
        joint = torch.where(joint.isnan() & ~log_ratio.isnan() & ~d.isnan(), torch.inf, joint)
        is_far = (d < -40) & (kl == estimate)  # where the rest of k3 is below an ulp of it
        value = torch.where(is_far, joint.exp(), value)
        slope = torch.where(is_far & ~is_held, -joint.exp(), slope)
    dlog_ratio = torch.where(is_own & ~is_clamped, product(ratio, weighted_slope), value)
    return _WithDerivatives.apply(value, log_ratio, dlog_ratio, logprobs, torch.where(is_own, 0, slope))


def kl_estimate(d: Tensor, estimator: str) -> Tensor:
    """The estimate by its name, of ``d = l - l_ref``."""
    if estimator == "k1":
        return d
    if estimator == "abs":
        return d.abs()
    if estimator == "k3":
        return torch.expm1(-d) + d.clamp(min=-1000)  # infinite long before
    return d.square() / 2


def kl_slopes(d: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    """The estimate's derivative, and that of ``exp(l - sg[l])`` times it: their sum, which may be finite alone."""
    if estimator == "k1":
        return torch.ones_like(d), d + 1
    if estimator == "abs":
        sign = torch.where(d.isnan(), d, d.sign())  # of NaN, NaN
        return sign, d.abs() + sign
    return (-torch.expm1(-d), d) if estimator == "k3" else (d, d * (d / 2 + 1))


class _WithDerivatives(torch.autograd.Function):
    """A value and its derivatives by the log-ratio and by the log-probability. What has no weight has no gradient."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, value: Tensor, log_ratio: Tensor, dlog_ratio: Tensor, logprobs: Tensor, dlogprobs: Tensor
    ) -> Tensor:
        ctx.save_for_backward(dlog_ratio, dlogprobs)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, dvalue: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dlog_ratio, dlogprobs = ctx.saved_tensors
        return None, product(dvalue, dlog_ratio), None, product(dvalue, dlogprobs), None


def _clamped(values: Tensor, bound: float | None) -> Tensor:
    return values if bound is None else values.clamp(-bound, bound)


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
    per_sequence = config.level == Level.SEQUENCE
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
