"""The policy loss in plain torch: the equations of the papers, with gradients by autograd.

A log-ratio above ``largest_log_ratio`` counts as infinite. So does a log-probability that is further than ``DISTANCE``
from the reference's or from 0. Values and gradients are then their mathematical limits. A clipped value is its clip
bound, with a gradient of 0. A token whose loss is unbounded has an infinite loss with the sign of its terms, and a
finite gradient; ``check_device_values`` reports it. NaN stays NaN. The sum of infinite losses of opposite signs is NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grpo_kernels.device_values import flag_infinite
from grpo_kernels.loss.config import GRPOLossConfig
from grpo_kernels.loss.finish_weights import finish_weights
from grpo_kernels.loss.inputs import PolicyInputs
from grpo_kernels.loss.limits import (
    DISTANCE,
    NEAR,
    all_within,
    largest_joint,
    largest_log_ratio,
    largest_term,
    straight_through_clamp,
)
from grpo_kernels.loss.options import Level, Surrogate


def policy_loss(
    logprobs: Tensor,  # [B, T] or [N]
    inputs: PolicyInputs,
    entropy: Tensor | None,  # like logprobs
    config: GRPOLossConfig,
) -> tuple[Tensor, Tensor]:
    """``sum w (-S + beta k) - entropy bonus``, and the metrics' partials ``[len(Partial)]``."""
    inputs, weight_partials = finish_weights(inputs, logprobs, entropy, config)
    mask = inputs.mask

    def unmasked(values: Tensor) -> Tensor:  # before any exp: inf * 0 is NaN
        return torch.where(mask, values, 0)

    logprobs = unmasked(logprobs)
    advantages = inputs.token_advantages
    weights, policy_weights = inputs.expand_to_tokens(inputs.weights), inputs.token_policy_weights
    difference = None if inputs.ref_logprobs is None else logprobs - unmasked(inputs.ref_logprobs)
    log_ratio = importance_log_ratio(logprobs, advantages, inputs, config)
    # training is far from the limits: then nothing is compared with them
    skip_limits = (
        all_within(log_ratio) and (difference is None or all_within(difference)) and all_within(logprobs, DISTANCE)
    )
    ratio = (
        log_ratio if skip_limits else straight_through_clamp(log_ratio, high=largest_log_ratio(log_ratio.dtype))
    ).exp()
    has_no_policy_term = (advantages == 0) | (policy_weights == 0)
    finite_logprobs = logprobs if skip_limits else straight_through_clamp(logprobs, low=-DISTANCE)
    values = surrogate(torch.where(has_no_policy_term, 1, ratio), finite_logprobs, advantages, config)
    losses = -policy_weights * values
    is_infinite = (
        None if skip_limits else (~has_no_policy_term & is_unbounded(values, log_ratio, logprobs, advantages, config))
    )
    kl = None
    if difference is not None:
        kl, is_kl_infinite = kl_penalty(difference, logprobs, log_ratio, ratio, skip_limits, inputs, config)
        kl_weights = config.penalty.weight * weights
        losses = losses + kl_weights * kl
        if is_infinite is not None and is_kl_infinite is not None:
            is_infinite = is_infinite | (is_kl_infinite & (kl_weights != 0))
    if is_infinite is not None:
        flag_infinite(is_infinite)
        infinity = torch.full_like(losses, torch.inf).copysign(losses.detach())
        losses = losses + torch.where(is_infinite, infinity, 0)
        # a clamp gives NaN a gradient of 0
        losses = losses + finite_logprobs * torch.where(losses.isnan(), torch.nan, 0)
    loss = losses.sum()
    if inputs.entropy_weights is not None and entropy is not None:
        loss = loss - (inputs.expand_to_tokens(inputs.entropy_weights) * unmasked(entropy)).sum()
    if config.level == Level.GEOMETRIC:  # the ratio of each token is clipped
        ratio = token_log_ratio(logprobs, inputs, config).exp()
    partials = metric_partials(ratio, advantages, kl, entropy, inputs, config)
    return loss, partials if weight_partials is None else torch.cat([partials, weight_partials])


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
    lengths = sequences.lengths(mask, logprobs.dtype).clamp(min=1)
    mean = torch.where(mask, sequences.spread(sequences.sum(summed) / lengths), 0)
    if config.level == Level.SEQUENCE_TOKEN:
        finite_logprobs = logprobs.clamp(min=-DISTANCE)
        return mean.detach() + (finite_logprobs - finite_logprobs.detach())
    return mean


def surrogate(ratio: Tensor, logprobs: Tensor, advantages: Tensor, config: GRPOLossConfig) -> Tensor:
    """The objective of a token, to be maximised.

    - ``min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A)``, with ``rho`` bounded by ``delta`` in the first term;
    - CISPO, eq. 4 (arXiv:2506.13585): ``sg[clip(rho)] A l``;
    - SAPO, eq. 6 (arXiv:2511.20347): ``4 / tau sigmoid(tau (rho - 1)) A``;
    - ``A l``.
    """
    low, high = config.ratio_bounds
    if config.surrogate == Surrogate.CISPO:
        return ratio.detach().clamp(low, high) * advantages * logprobs
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


@torch.no_grad()
def is_unbounded(
    values: Tensor, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor, config: GRPOLossConfig
) -> Tensor:
    """Which tokens have an unbounded objective."""
    if config.surrogate in (Surrogate.CISPO, Surrogate.LOGPROB):
        return (logprobs < -DISTANCE) & (values != 0)
    largest = largest_log_ratio(log_ratio.dtype)
    return (log_ratio > largest) & (values.abs() > advantages.abs() * math.exp(largest / 2))


def kl_penalty(
    difference: Tensor,  # log-probability minus the reference's
    logprobs: Tensor,
    log_ratio: Tensor,
    ratio: Tensor,
    skip_limits: bool,
    inputs: PolicyInputs,
    config: GRPOLossConfig,
) -> tuple[Tensor, Tensor | None]:
    """The estimate of the KL divergence, with ``d = l - l_ref``; times the importance ratio if it is bias-corrected.

    http://joschu.net/blog/kl-approx.html. "straight_through" has the gradient of k2; "importance_weighted" is times
    ``exp(l - sg[l])`` (arXiv:2506.09477).

    Returns:
        The estimate, and which tokens have an unbounded one; None with ``skip_limits``.
    """
    penalty = config.penalty
    d = _clamped(difference, config.log_ratio_clamp)
    low = -largest_log_ratio(d.dtype) if penalty.estimator == "k3" else -DISTANCE
    distance = d
    if not skip_limits:
        distance = straight_through_clamp(d, low, DISTANCE)
        if penalty.is_bias_corrected:  # the derivatives of the product must be finite too
            is_past = (log_ratio > largest_log_ratio(d.dtype)) | (d.abs() > DISTANCE)
            distance = torch.where(is_past, straight_through_clamp(d, -NEAR, NEAR), distance)
    estimate = kl_estimate(distance, penalty.estimator)
    kl = _clamped(estimate, config.kl_clamp)
    is_infinite = None if skip_limits else ((d < low) | (d > DISTANCE)) & (kl == estimate)
    if penalty.gradient == "importance_weighted":
        finite_logprobs = logprobs if skip_limits else straight_through_clamp(logprobs, low=-DISTANCE)
        is_clamped = (d != difference) | (kl != estimate)
        kl = torch.where(is_clamped, kl, kl * (finite_logprobs - finite_logprobs.detach()).exp())
    if penalty.gradient == "straight_through":
        k2 = kl_estimate(d if skip_limits else straight_through_clamp(d, -DISTANCE, DISTANCE), "k2")
        kl = kl.detach() + (k2 - k2.detach())
    if not penalty.is_bias_corrected:
        return kl, is_infinite
    value = kl * ratio
    if is_infinite is None:
        return value, None
    value = straight_through_clamp(value, -largest_term(d.dtype), largest_term(d.dtype))
    is_infinite = (ratio != 0) & (kl != 0) & (is_infinite | (log_ratio > largest_log_ratio(d.dtype)))
    if penalty.estimator != "k3":
        return value, is_infinite
    far, is_far, is_far_infinite = far_k3(d, log_ratio, inputs, config)
    is_far = is_far & (kl == estimate)
    return torch.where(is_far, far, value), torch.where(is_far, is_far_infinite, is_infinite)


def far_k3(d: Tensor, log_ratio: Tensor, inputs: PolicyInputs, config: GRPOLossConfig) -> tuple[Tensor, Tensor, Tensor]:
    """``r k3`` for large ``exp(-d)``, as one exponential ``r exp(-d)``: the other terms of k3 are negligible there.

    ``exp(-d)`` may overflow while ``r`` underflows. If the log-probability is minus infinity, ``log r - d`` is NaN. The
    product is then the reference over the old policy if the ratio is of this token alone, else unbounded.

    Returns:
        The product; which tokens it holds for; and which of these have an unbounded one.
    """
    joint = straight_through_clamp(log_ratio, high=largest_log_ratio(d.dtype)) - d
    largest = largest_joint(d.dtype)
    is_far = (d < -NEAR) | (joint > largest)
    limit = torch.full_like(d, torch.inf)
    if inputs.ref_logprobs is not None and inputs.old_logprobs is not None:
        is_alone = inputs.mask
        if config.level != Level.TOKEN:
            is_alone = inputs.sequences.spread(inputs.sequences.lengths(inputs.mask, d.dtype)) == 1
        limit = torch.where(is_alone, inputs.ref_logprobs - inputs.old_logprobs, limit)
    joint = torch.where(joint.isnan() & ~log_ratio.isnan(), limit, joint)
    return straight_through_clamp(joint, high=largest).exp(), is_far, joint > largest


def kl_estimate(d: Tensor, estimator: str) -> Tensor:
    """The named estimate of ``d = l - l_ref``."""
    if estimator == "k1":
        return d
    if estimator == "abs":
        return d.abs()
    return torch.expm1(-d) + d if estimator == "k3" else d.square() / 2


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
    """The sums, counts and extrema of ``PolicyMetrics``, in the order of ``Partial``."""
    mask, sequences = inputs.mask, inputs.sequences
    low, high = config.ratio_bounds
    bounded = ratio if config.delta is None else ratio.clamp(max=config.delta)
    is_low = mask & (bounded < low) & (advantages < 0)
    is_high = mask & (bounded > high) & (advantages > 0)
    dtype = ratio.dtype
    tokens = sequences.lengths(mask, dtype)
    low_share = sequences.sum(is_low.to(dtype)) / tokens.clamp(min=1)
    high_share = sequences.sum(is_high.to(dtype)) / tokens.clamp(min=1)
    per_sequence = config.level == Level.SEQUENCE
    # a sequence without tokens has no clipped share at token level; at sequence level it has a ratio, of 1
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
            _append(torch.where(has_share, low_share, torch.inf), torch.inf).amin(),
            _append(torch.where(has_share, high_share, -torch.inf), -torch.inf).amax(),
        ]
    )


def _append(shares: Tensor, value: float) -> Tensor:  # [S] -> [S + 1]
    """The shares and one more value, so that an extremum exists for a batch without sequences."""
    return torch.cat([shares, shares.new_full((1,), value)])
