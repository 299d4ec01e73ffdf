"""Weights that depend on the log-probabilities: masks by entropy and by policy, VESPO's, those by covariance. Detached.

They are computed after the pass for the log-probabilities and before the gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grpo_kernels.loss.config import GRPOLossConfig
from grpo_kernels.loss.inputs import PolicyInputs

_LOG_RATIO_BOUND = 20.0  # upper bound of VESPO's log-ratios
_LOG_RATIO_FLOOR = math.log(1e-8)  # the lower one


@torch.no_grad()
def finish_weights(
    inputs: PolicyInputs, logprobs: Tensor, entropy: Tensor | None, config: GRPOLossConfig
) -> tuple[PolicyInputs, Tensor | None]:
    """The inputs with their final weights, and the partials of ``PolicyMetrics`` that only these define."""
    if not config.weights_need_logprobs:
        return inputs, None
    mask, sequences, dtype = inputs.mask, inputs.sequences, inputs.weights.dtype
    logprobs = torch.where(mask, logprobs.to(dtype), 0)
    entropy = None if entropy is None else entropy.to(dtype)
    factors = torch.ones_like(logprobs) if inputs.fields.policy_factors is None else inputs.fields.policy_factors
    entropy_weights = inputs.entropy_weights
    partials = None
    if config.off_policy_mask_threshold is not None:
        factors = torch.where(_is_on_policy(inputs, logprobs, config.off_policy_mask_threshold), factors, 0)
    if config.top_entropy_quantile < 1 and entropy is not None:
        is_top = _is_top_entropy(entropy, mask, inputs.entropy_threshold, 1 - config.top_entropy_quantile)
        factors = torch.where(is_top, factors, 0)
        if entropy_weights is not None:  # the bonus is on the mean over the remaining tokens
            count, remaining = (tokens.sum().clamp(min=1).to(dtype) for tokens in (mask, is_top))
            scaled = torch.where(is_top, inputs.expand_to_tokens(entropy_weights) * (count / remaining), 0)
            entropy_weights = inputs.as_per_token(scaled)
    if config.loss_type == "vespo":
        phi = _gamma_weights(inputs, logprobs, config)
        factors = factors * phi
        lengths = sequences.lengths(mask, dtype)
        means = sequences.sum(torch.where(mask, phi, 0)) / lengths.clamp(min=1)
        means = torch.where(lengths > 0, means, 1)  # a sequence without tokens has the ratio 1
        partials = torch.stack([means.sum(), means.new_ones(()) * sequences.count])
    if config.loss_type == "clip_cov":
        factors = torch.where(_is_dropped_by_covariance(inputs, logprobs, config), 0, factors)
    if config.loss_type == "kl_cov" and inputs.old_logprobs is not None:
        # Masks and corrections of the policy term apply to the penalty too. Other tokens are compared with
        # themselves: their distance is 0. At a log-probability of minus infinity it would be NaN; there the ratio is 0,
        # and so is the policy term, so that the token can be left out.
        is_chosen = _has_top_covariance(inputs, logprobs, config.kl_cov_ratio)
        is_lost = ~is_chosen & (logprobs == -torch.inf)
        weights = torch.where(is_lost, 0, inputs.expand_to_tokens(inputs.weights) * factors)
        compared = torch.where(is_chosen | is_lost, inputs.old_logprobs, logprobs)
        return inputs.with_fields(
            weights=inputs.as_per_token(weights),
            policy_factors=None,
            entropy_weights=entropy_weights,
            ref_logprobs=compared,
        ), None
    return inputs.with_fields(policy_factors=factors, entropy_weights=entropy_weights), partials


def _is_on_policy(inputs: PolicyInputs, logprobs: Tensor, threshold: float) -> Tensor:  # like logprobs
    """Whether the advantage is not negative, or the sequence is near the policy (DeepSeek-V3.2, arXiv:2512.02556)."""
    mask, sequences = inputs.mask, inputs.sequences
    sampler = inputs.old_logprobs if inputs.sampling_logprobs is None else inputs.sampling_logprobs
    sampler = logprobs if sampler is None else sampler
    divergence = torch.where(mask, sampler - logprobs, 0).nan_to_num(nan=0.0)
    lengths = sequences.lengths(mask, logprobs.dtype).clamp(min=1)
    return (inputs.token_advantages >= 0) | sequences.spread(sequences.sum(divergence) / lengths <= threshold)


def _is_top_entropy(entropy: Tensor, mask: Tensor, threshold: Tensor | float | None, quantile: float) -> Tensor:
    """Whether a token is unmasked with an entropy of at least the threshold, by default a quantile. No sync."""
    if threshold is None and mask.numel() == 0:
        return mask
    if threshold is None:
        values = torch.where(mask, entropy, torch.inf).flatten().sort().values
        position = (mask.sum() - 1).clamp(min=0).to(values.dtype) * quantile
        low, high = (values.take(index.long()) for index in (position.floor(), position.ceil()))
        threshold = torch.lerp(low, high, position - position.floor())
    return mask & (torch.where(mask, entropy, 0) >= threshold)


def _gamma_weights(inputs: PolicyInputs, logprobs: Tensor, config: GRPOLossConfig) -> Tensor:  # like logprobs
    """``phi(w) = e^lambda w^k e^(-lambda w)`` of the whole sequence's ratio: VESPO (arXiv:2602.10693)."""
    mask, sequences = inputs.mask, inputs.sequences
    log_ratio = inputs.log_ratio(logprobs).clamp(-_LOG_RATIO_BOUND, _LOG_RATIO_BOUND)
    if inputs.rollout_weights is not None:
        rollout = inputs.rollout_weights.log().clamp(_LOG_RATIO_FLOOR, _LOG_RATIO_BOUND)
        log_ratio = log_ratio + torch.where(mask, rollout, 0)
    log_w = sequences.spread(sequences.sum(log_ratio).clamp(_LOG_RATIO_FLOOR, _LOG_RATIO_BOUND))
    is_positive = inputs.token_advantages >= 0
    k = torch.where(is_positive, config.vespo_k_pos, torch.full_like(log_w, config.vespo_k_neg))
    decay = torch.where(is_positive, config.vespo_lambda_pos, torch.full_like(log_w, config.vespo_lambda_neg))
    return torch.exp(decay + k * log_w - decay * log_w.exp()).nan_to_num(nan=0.0, posinf=0.0)


def _covariance(inputs: PolicyInputs, logprobs: Tensor) -> Tensor:  # like logprobs
    """``(A - mean A) (l - mean l)`` over the unmasked tokens."""
    count = inputs.mask.sum().clamp(min=1)

    def centred(values: Tensor) -> Tensor:
        values = torch.where(inputs.mask, values, 0)
        return values - values.sum() / count

    return centred(inputs.token_advantages) * centred(logprobs)


def _is_dropped_by_covariance(
    inputs: PolicyInputs, logprobs: Tensor, config: GRPOLossConfig
) -> Tensor:  # like logprobs
    """Which tokens Clip-Cov drops: drawn at random from the unclipped tokens whose covariance is in the range.

    arXiv:2505.22617 eq. 11. No sync.
    """
    low, high = config.ratio_bounds
    ratio = inputs.log_ratio(logprobs).exp()
    is_clipped = ratio.clamp(low, high) * inputs.token_advantages < ratio * inputs.token_advantages
    covariance = _covariance(inputs, logprobs)
    candidates = inputs.mask & ~is_clipped & (covariance > config.clip_cov_lb) & (covariance < config.clip_cov_ub)
    drawn = torch.where(candidates, torch.rand_like(logprobs), torch.inf)
    return candidates & (drawn <= _bound_of_smallest(drawn, inputs.mask, config.clip_cov_ratio))


def _has_top_covariance(inputs: PolicyInputs, logprobs: Tensor, share: float) -> Tensor:  # like logprobs
    """Which tokens KL-Cov penalises: those of the highest covariance (arXiv:2505.22617 eq. 12). No sync."""
    order = torch.where(inputs.mask, -_covariance(inputs, logprobs), torch.inf)
    return inputs.mask & (order <= _bound_of_smallest(order, inputs.mask, share))


def _bound_of_smallest(values: Tensor, mask: Tensor, share: float) -> Tensor:  # -> []
    """The n-th smallest value, where n is this share of the unmasked tokens, but at least 1."""
    count = (mask.sum().double() * share).floor().long().clamp(min=1, max=max(values.numel(), 1))
    return values.flatten().sort().values.take(count - 1) if values.numel() else values.new_zeros(())
