"""The inputs of a loss: validated, in one dtype, with the reduction expressed as weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo_kernels.loss.config import GRPOLossConfig
from grpo_kernels.loss.fields import TokenFields
from grpo_kernels.loss.options import Level, Surrogate
from grpo_kernels.loss.sequences import Sequences
from grpo_kernels.loss.weights import divides_by_items, loss_weights, rollout_weights, token_mean
from grpo_kernels.validation import (
    check_cu_seqlens,
    check_device,
    check_float,
    check_mask,
    check_no_nan,
    check_num_items,
    check_number,
    check_real,
    check_shape,
)


@dataclass(frozen=True)
class PolicyInputs:
    """Inputs of tokens ``[B, T]``, or ``[N]`` when packed.

    The weights contain the loss type's mean, the rollout weights, the entropy bonus and the loss scale. So kernels need
    no reduction.

    Args:
        sequences: How the tokens divide into completions.
        fields: The tensors for kernels. Values per token have the tokens' shape; only packed advantages and weights are
            ``[1, N]``.
        sampling_logprobs, rollout_weights, entropy_threshold: For weights that depend on log-probabilities.
    """

    sequences: Sequences
    fields: TokenFields
    sampling_logprobs: Tensor | None = None
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
        """Validates the arguments of a public loss."""
        logprobs = {
            "old_logprobs": old_logprobs,
            "ref_logprobs": ref_logprobs,
            "sampling_logprobs": sampling_logprobs,
        }
        _check(tokens, advantages, completion_mask, logprobs, rollout_is_weights, cu_seqlens, config, debug)
        check_number("loss_scale", loss_scale)
        _check_threshold(entropy_threshold, config)
        sequences = Sequences.of(tokens, cu_seqlens)
        reads_reference = config.beta != 0 and not config.has_exact_divergence
        reads_sampler = config.off_policy_mask_threshold is not None
        mask = completion_mask if completion_mask.dtype == torch.bool else completion_mask != 0
        check_num_items(num_items_in_batch, mask, debug, divides=divides_by_items(config))
        weights = loss_weights(mask, sequences, config, num_items_in_batch, loss_scale, dtype)
        rollout = None
        if rollout_is_weights is not None:
            rollout = sequences.per_token(_cast(rollout_is_weights, dtype))
        elif config.rollout_correction is not None and old_logprobs is not None and sampling_logprobs is not None:
            rollout = rollout_weights(old_logprobs.to(dtype), sampling_logprobs.to(dtype), mask, sequences, config)
        is_vespo = config.loss_type == "vespo"  # whose phi contains the rollout weights
        entropy_weights = None
        if config.entropy_coef != 0:
            mean = token_mean(mask, dtype, loss_scale) if config.loss_agg_mode is None else weights
            entropy_weights = mean * config.entropy_coef
        if advantages is not None:
            advantages = _cast(advantages, dtype)
            if sequences.packed and advantages.shape == tokens.shape:
                advantages = advantages[None]
        fields = TokenFields(
            mask.contiguous(),
            None,
            advantages,
            weights,
            rollout.contiguous() if rollout is not None and not is_vespo else None,
            entropy_weights,
            None if old_logprobs is None else _cast(old_logprobs, dtype),
            _cast(ref_logprobs, dtype) if ref_logprobs is not None and reads_reference else None,
        )
        sampler = _cast(sampling_logprobs, dtype) if sampling_logprobs is not None and reads_sampler else None
        inputs = cls(sequences, fields, sampler, rollout if is_vespo else None, entropy_threshold)
        if debug:
            inputs.check_values()
        return inputs

    def check_values(self) -> None:
        """Raises ValueError for a NaN of an unmasked token, or an infinite advantage. Not while a graph is traced."""
        fields = self.fields
        if fields.advantages is not None:
            check_no_nan("advantages", self.token_advantages, self.mask, finite=True)
        for name, values in (
            ("old_logprobs", fields.old_logprobs),
            ("ref_logprobs", fields.ref_logprobs),
            ("rollout_is_weights", fields.policy_factors if self.rollout_weights is None else self.rollout_weights),
        ):
            if values is not None:
                check_no_nan(name, values, self.mask)

    @property
    def mask(self) -> Tensor:  # like the tokens
        return self.fields.mask

    @property
    def weights(self) -> Tensor:
        return self.fields.weights

    @property
    def old_logprobs(self) -> Tensor | None:  # like the tokens
        return self.fields.old_logprobs

    @property
    def ref_logprobs(self) -> Tensor | None:  # like the tokens
        return self.fields.ref_logprobs

    @property
    def entropy_weights(self) -> Tensor | None:
        return self.fields.entropy_weights

    def with_fields(self, **changes: Tensor | None) -> PolicyInputs:
        """A copy with other fields."""
        return replace(self, fields=replace(self.fields, **changes))

    @property
    def row_fields(self) -> TokenFields:
        """The fields for row kernels. Packed tokens get ``sequence_ids`` if anything is per completion."""
        fields = self.fields
        needs_ids = self.sequences.packed and (fields.has_completions or fields.advantages is None)
        return replace(fields, sequence_ids=self.sequences.ids) if needs_ids else fields

    @property
    def flat_fields(self) -> TokenFields:
        """The fields flattened, so that tokens can be selected; with ``sequence_ids`` if anything is per completion."""
        fields = self.fields.map_tokens(lambda values: values)
        return replace(fields, sequence_ids=self.sequences.ids) if fields.has_completions else fields

    def expand_to_tokens(self, values: Tensor) -> Tensor:  # like the tokens
        """Advantages or weights per token; 0 where masked."""
        if values.dim() == 1:
            values = self.sequences.spread(values)
        elif values.dim() == 2:
            values = values.view(self.mask.shape)
        return torch.where(self.mask, values, 0)

    def as_per_token(self, values: Tensor) -> Tensor:  # like the tokens -> [B, T] or [1, N]
        """Advantages or weights per token, with the two dimensions that mark them as such in ``TokenFields``."""
        return values[None] if self.sequences.packed else values

    @property
    def token_advantages(self) -> Tensor:  # like the tokens
        if self.fields.advantages is None:
            raise ValueError("advantages must be given, got None")
        return self.expand_to_tokens(self.fields.advantages)

    @property
    def token_policy_weights(self) -> Tensor:  # like the tokens
        """The weights of the policy term."""
        weights, factors = self.expand_to_tokens(self.fields.weights), self.fields.policy_factors
        return weights if factors is None else weights * torch.where(self.mask, factors, 0)

    def log_ratio(self, logprobs: Tensor) -> Tensor:  # like logprobs
        """``l - l_old`` of each token; 0 where masked. On-policy it is 0, or NaN for a NaN."""
        old = logprobs.detach() if self.old_logprobs is None else self.old_logprobs
        return torch.where(self.mask, logprobs - old, 0)

    def as_token_local(self, config: GRPOLossConfig) -> tuple[PolicyInputs, GRPOLossConfig]:
        """The same loss in token-local form, if it has one; otherwise unchanged.

        On-policy every ratio is 1. With a sequence-level ratio each token's coefficient is then the mean of ``f A``
        over its sequence, which needs no logits. This does not hold for a KL term that is multiplied by the ratio.
        """
        if config.is_token_local or config.weights_need_logprobs or self.old_logprobs is not None:
            return self, config
        if config.level == Level.SEQUENCE_TOKEN:  # its gradient is each token's own
            return self, replace(config, importance_sampling_level="token")
        has_corrected_kl = self.ref_logprobs is not None and config.use_bias_correction_kl
        is_clipped = config.delta is not None and config.delta < 1
        if config.level != Level.SEQUENCE or config.surrogate != Surrogate.CLIP or is_clipped or has_corrected_kl:
            return self, config
        config = replace(config, importance_sampling_level="token")
        factors, advantages = self.fields.policy_factors, self.fields.advantages
        if factors is None and advantages is not None and advantages.dim() == 1:
            return self, config
        weighted_advantages = self.token_advantages if factors is None else self.token_advantages * factors
        lengths = self.sequences.lengths(self.mask, self.weights.dtype).clamp_(min=1)
        mean = self.sequences.sum(torch.where(self.mask, weighted_advantages, 0)) / lengths
        return self.with_fields(advantages=mean, policy_factors=None), config


def _cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values detached, contiguous and in ``dtype``; not copied if they are."""
    if values.requires_grad:
        values = values.detach()
    return (values if values.dtype == dtype else values.to(dtype)).contiguous()


def _check_threshold(entropy_threshold: Tensor | float | None, config: GRPOLossConfig) -> None:
    if entropy_threshold is None:
        return
    if config.top_entropy_quantile == 1:
        raise ValueError(f"entropy_threshold has no effect with top_entropy_quantile=1, got {entropy_threshold!r}")
    check_number("entropy_threshold", entropy_threshold)
    if isinstance(entropy_threshold, Tensor):
        if entropy_threshold.numel() != 1:
            shape = list(entropy_threshold.shape)
            raise ValueError(f"entropy_threshold must be a number or a 0-dim tensor, got shape {shape}")
        return
    if entropy_threshold != entropy_threshold:
        raise ValueError(f"entropy_threshold must be a number, got {entropy_threshold!r}")


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
        check_real("advantages", advantages)
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
