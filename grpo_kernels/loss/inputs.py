"""What the loss of a token needs beside its log-probability: validated, in one dtype, with the reduction as weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo_kernels.loss.config import GRPOLossConfig
from grpo_kernels.loss.metrics import Partial
from grpo_kernels.loss.options import Level, Surrogate
from grpo_kernels.loss.sequences import Sequences
from grpo_kernels.loss.weights import rollout_weights, token_weights
from grpo_kernels.validation import check_cu_seqlens, check_device, check_float, check_mask, check_shape


@dataclass(frozen=True)
class PolicyInputs:
    """Per-token inputs, each shaped like the tokens: ``[B, T]``, or ``[N]`` when packed.

    The loss is ``sum(-policy_weights S + beta kl_weights k - entropy_weights H)``: every loss type, the rollout
    weights, the entropy bonus and the loss scale are in the weights, so kernels know of no reduction.
    """

    sequences: Sequences
    mask: Tensor  # bool
    advantages: Tensor | None  # None where the kernel makes them of rewards
    policy_weights: Tensor
    kl_weights: Tensor
    entropy_weights: Tensor | None
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    sampling_logprobs: Tensor | None = None  # this and the next two: for weights that wait for log-probabilities
    rollout_weights: Tensor | None = None
    entropy_threshold: Tensor | float | None = None

    @classmethod
    def of(
        cls,
        tokens: Tensor,  # [B, T] or [N]: what the other inputs must fit
        dtype: torch.dtype,
        advantages: Tensor | None,
        completion_mask: Tensor,
        *,
        old_logprobs: Tensor | None = None,
        ref_logprobs: Tensor | None = None,
        sampling_logprobs: Tensor | None = None,
        rollout_is_weights: Tensor | None = None,
        entropy_threshold: Tensor | float | None = None,
        num_items_in_batch: float | Tensor | None,
        cu_seqlens: Tensor | None,
        loss_scale: float,
        config: GRPOLossConfig,
        debug: bool,
    ) -> PolicyInputs:
        """Validates the arguments of a public loss, as its docstring gives them."""
        logprobs = {
            "old_logprobs": old_logprobs,
            "ref_logprobs": ref_logprobs,
            "sampling_logprobs": sampling_logprobs,
        }
        _check(tokens, advantages, completion_mask, logprobs, rollout_is_weights, cu_seqlens, config, debug)
        _check_items(num_items_in_batch)
        _check_threshold(entropy_threshold, config)
        sequences = Sequences.of(tokens, cu_seqlens)
        mask = completion_mask != 0
        weights = token_weights(mask, sequences, config, num_items_in_batch, dtype) * loss_scale
        rollout = None
        if rollout_is_weights is not None:
            rollout = sequences.per_token(rollout_is_weights.to(dtype))
        elif config.rollout_correction is not None and old_logprobs is not None and sampling_logprobs is not None:
            rollout = rollout_weights(old_logprobs.to(dtype), sampling_logprobs.to(dtype), mask, sequences, config)
        has_own_place = config.loss_type == "vespo"  # inside of its weight
        policy_weights = weights if rollout is None or has_own_place else weights * torch.where(mask, rollout, 0)
        entropy_weights = None
        if config.entropy_coef != 0 and config.loss_agg_mode is not None:
            entropy_weights = weights * config.entropy_coef
        elif config.entropy_coef != 0:
            count = mask.sum().clamp(min=1)
            entropy_weights = mask.to(dtype) * (config.entropy_coef * loss_scale) / count

        def cast(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.detach().to(dtype)

        return cls(
            sequences,
            mask,
            None if advantages is None else sequences.per_token(advantages.detach().to(dtype)),
            policy_weights,
            weights,
            entropy_weights,
            cast(old_logprobs),
            cast(ref_logprobs) if config.beta != 0 and not config.has_exact_divergence else None,
            cast(sampling_logprobs) if config.off_policy_mask_threshold is not None else None,
            rollout if has_own_place else None,
            entropy_threshold,
        )

    def log_ratio(self, logprobs: Tensor) -> Tensor:  # like logprobs
        """``l - l_old`` of each token; 0 on-policy, or a NaN's NaN, and where masked."""
        old = logprobs.detach() if self.old_logprobs is None else self.old_logprobs
        return torch.where(self.mask, logprobs - old, 0)

    def add_divergence(
        self, loss: Tensor, partials: Tensor, divergence: Tensor, config: GRPOLossConfig
    ) -> tuple[Tensor, Tensor]:
        """Adds the penalty of an exact divergence to the loss, and its sum to what ``PolicyMetrics`` reads."""
        values = torch.where(self.mask, divergence.to(loss.dtype), 0)
        penalty = (torch.where(self.mask, self.kl_weights, 0) * values).sum()
        partials = partials.clone()
        partials[Partial.KL] += values.detach().sum()
        return loss + config.beta * penalty, partials

    def token_local(self, config: GRPOLossConfig) -> tuple[PolicyInputs, GRPOLossConfig]:
        """The same loss with coefficients known token by token, where that is so; else unchanged.

        On-policy every ratio is 1, so a sequence-level ratio hands each token of a sequence the mean of what its
        tokens' policy terms weigh: known before any logit. Not so with a KL term that is multiplied by the ratio.
        """
        if config.is_token_local or not config.has_settled_weights or self.old_logprobs is not None:
            return self, config
        if config.level == Level.SEQUENCE_TOKEN:  # whose gradient is each token's own
            return self, replace(config, importance_sampling_level="token")
        waits_for_kl = self.ref_logprobs is not None and config.use_bias_correction_kl
        is_clipped = config.delta is not None and config.delta < 1
        if config.level != Level.SEQUENCE or config.surrogate != Surrogate.CLIP or is_clipped or waits_for_kl:
            return self, config
        ones = self.mask.to(self.policy_weights.dtype)
        pull = torch.where(self.mask, self.policy_weights * self.advantages, 0)
        mean = self.sequences.sum(pull) / self.sequences.sum(ones).clamp(min=1)
        inputs = replace(self, advantages=self.sequences.spread(mean), policy_weights=ones)
        return inputs, replace(config, importance_sampling_level="token")

    def flat(self) -> tuple[Tensor | None, ...]:
        """The tensors as kernels take them, contiguous ``[N]``: the fields from ``mask`` to ``ref_logprobs``."""
        fields = (
            self.mask,
            self.advantages,
            self.policy_weights,
            self.kl_weights,
            self.entropy_weights,
            self.old_logprobs,
            self.ref_logprobs,
        )
        return tuple(None if f is None else f.reshape(-1).contiguous() for f in fields)


#: ``PolicyInputs.flat`` in the dispatcher's language.
FLAT_SCHEMA = (
    "Tensor mask, Tensor advantages, Tensor policy_weights, Tensor kl_weights, Tensor? entropy_weights, "
    "Tensor? old_logprobs, Tensor? ref_logprobs"
)
FLAT_COUNT = FLAT_SCHEMA.count(",") + 1


def _check_threshold(entropy_threshold: Tensor | float | None, config: GRPOLossConfig) -> None:
    if entropy_threshold is None:
        return
    if config.top_entropy_quantile == 1:
        raise ValueError(f"entropy_threshold has no effect with top_entropy_quantile=1, got {entropy_threshold!r}")
    if isinstance(entropy_threshold, Tensor):
        if entropy_threshold.numel() != 1:
            shape = list(entropy_threshold.shape)
            raise ValueError(f"entropy_threshold must be a number or a 0-dim tensor, got shape {shape}")
    elif entropy_threshold != entropy_threshold:
        raise ValueError(f"entropy_threshold must be a number, got {entropy_threshold!r}")


def _check_items(num_items_in_batch: float | Tensor | None) -> None:
    if isinstance(num_items_in_batch, Tensor):
        if num_items_in_batch.numel() != 1:
            shape = list(num_items_in_batch.shape)
            raise ValueError(f"num_items_in_batch must be a number or a 0-dim tensor, got shape {shape}")
    elif num_items_in_batch is not None and not num_items_in_batch >= 0:
        raise ValueError(f"num_items_in_batch must be at least 0, got {num_items_in_batch!r}")


def _check(
    tokens: Tensor,
    advantages: Tensor | None,
    completion_mask: Tensor,
    logprobs: dict[str, Tensor | None],
    rollout_is_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    config: GRPOLossConfig,
    debug: bool,
) -> None:
    check_mask("completion_mask", completion_mask)
    check_shape("completion_mask", completion_mask, tokens.shape)
    check_cu_seqlens(cu_seqlens, tokens, debug)
    count = tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if advantages is not None:
        check_float("advantages", advantages)
        check_shape("advantages", advantages, (count,), tokens.shape)
        if config.loss_type in ("vespo", "gmpo") and advantages.shape != (count,):
            raise ValueError(
                f'advantages must be one per completion, [{count}], with loss_type="{config.loss_type}", '
                f"got {list(advantages.shape)}"
            )
    for name, values in logprobs.items():
        if values is not None:
            check_float(name, values)
            check_shape(name, values, tokens.shape)
    if rollout_is_weights is not None:
        check_float("rollout_is_weights", rollout_is_weights)
        per_sequence = () if config.loss_type == "vespo" else ((count, 1),)
        check_shape("rollout_is_weights", rollout_is_weights, tokens.shape, *per_sequence)
        if config.rollout_correction is not None:
            raise ValueError(
                f'rollout_is_weights must be None with rollout_correction="{config.rollout_correction}", got a tensor'
            )
    if config.beta != 0 and not config.has_exact_divergence and logprobs["ref_logprobs"] is None:
        raise ValueError(f"ref_logprobs must be given when beta is not 0 (beta={config.beta}), got None")
    for name in ("old_logprobs", "sampling_logprobs"):
        if config.rollout_correction is not None and logprobs[name] is None:
            raise ValueError(f'{name} must be given with rollout_correction="{config.rollout_correction}", got None')
    check_device(
        tokens.device,
        [
            ("advantages", advantages),
            ("completion_mask", completion_mask),
            *logprobs.items(),
            ("rollout_is_weights", rollout_is_weights),
            ("cu_seqlens", cu_seqlens),
        ],
    )
