"""The loss configuration, with TRL's names and defaults, validated once; and its flat form for kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from grpo_kernels.calls import Call
from grpo_kernels.computed_once import computed_once
from grpo_kernels.loss.aggregation import CLIPPED_LOSSES
from grpo_kernels.loss.config_checks import (
    check_choice,
    check_config,
    check_preset,
    check_range,
    refuse_unknown_fields,
)
from grpo_kernels.loss.options import (
    DIVERGENCES,
    IMPORTANCE_SAMPLING_LEVELS,
    KL_ESTIMATORS,
    KL_GRADIENTS,
    Level,
    Option,
    Param,
    Surrogate,
)

#: The default mean of each loss type, by verl's names; here it also counts sequences without a token. The other loss
#: types have "token-mean".
_DEFAULT_AGGREGATIONS = {**CLIPPED_LOSSES, "sapo": "seq-mean-token-mean", "gmpo": "seq-mean-token-mean"}
_SURROGATES = dict.fromkeys((*CLIPPED_LOSSES, "surrogate", "kl_cov", "gmpo"), Surrogate.CLIP) | {
    "cispo": Surrogate.CISPO,
    "sapo": Surrogate.SAPO,
    "vespo": Surrogate.LOGPROB,
    "reinforce": Surrogate.LOGPROB,
}
#: Functions that translate another framework's options, by its name; ``grpo_kernels.integrations.presets`` adds them.
PRESETS: dict[str, Callable[..., dict[str, Any]]] = {}
_LEVELS = dict(zip(IMPORTANCE_SAMPLING_LEVELS, (Level.TOKEN, Level.SEQUENCE, Level.SEQUENCE_TOKEN), strict=True))


_BETA = int(Param.BETA)  # torch.compile cannot index by an enumeration


@dataclass(frozen=True)
class LossCode(Call):
    """A configuration as kernels take it: what to compute per token, without any reduction."""

    options: list[int]  # by ``Option``
    params: list[float]  # by ``Param``

    @property
    def beta(self) -> float:
        return self.params[_BETA]


class Penalty(NamedTuple):
    """A penalised divergence: its weight, its estimator and the estimator's gradient."""

    weight: float
    estimator: str
    gradient: str
    is_bias_corrected: bool


@refuse_unknown_fields(PRESETS)
@dataclass(frozen=True, kw_only=True)
class GRPOLossConfig:
    """What the GRPO family of losses computes. Names and defaults are TRL 1.16's.

    Example:
        >>> GRPOLossConfig(loss_type="dr_grpo", max_completion_length=512, epsilon_high=0.28, beta=0.0)
        GRPOLossConfig(loss_type='dr_grpo', epsilon_high=0.28, max_completion_length=512)
        >>> GRPOLossConfig.trl(loss_type="grpo", epsilon=0.1, max_completion_length=None)
        GRPOLossConfig(loss_type='grpo', epsilon_low=0.1)

    The loss types, with the objective of a token of advantage ``A``, and the mean over tokens:

    - "grpo", "bnpo", "dr_grpo", "dapo", "luspo", "ppo": the clipped ratio times ``A``. They differ in the mean. "grpo":
      the token mean of each sequence, averaged over sequences. "bnpo", "ppo": the mean over local tokens. "dr_grpo":
      the sum over ``max_completion_length`` times the number of sequences. "dapo": the sum over
      ``num_items_in_batch``. "luspo": the sum of each sequence, averaged over sequences (arXiv:2602.05261).
    - "surrogate": the ratio times ``A``, unclipped; mean as "dapo".
    - "clip_cov": as "dapo", but some random tokens leave the policy term, among those whose log-probability and
      advantage have a high covariance (arXiv:2505.22617).
    - "kl_cov": as "surrogate", with a penalty ``|log ratio|`` on the tokens of the highest covariance (same paper).
    - "cispo": ``clip(ratio) A logprob``, the clipped ratio detached; mean as "dapo" (arXiv:2506.13585).
    - "sapo": ``4 / tau sigmoid(tau (ratio - 1)) A``; mean as "grpo" (arXiv:2511.20347).
    - "vespo": ``phi A logprob``, ``phi`` a detached function of the sequence's ratio; mean as "dapo".
    - "gmpo": the geometric mean of a sequence's ratios, clipped in log space, times ``A``; the mean over sequences
      (arXiv:2507.20673).
    - "reinforce": ``A logprob``; mean as "dapo".

    Args:
        loss_type: One of the above.
        loss_agg_mode: verl's name of a mean that replaces the loss type's, for the policy term, the KL and the entropy
            bonus. Sequences without a token do not count. "seq-mean-token-sum-norm" divides by
            ``max_completion_length``. None means the loss type's mean.
        importance_sampling_level: "token"; "sequence" for one ratio per sequence, the exponential of its mean log-ratio
            (GSPO, arXiv:2507.18071); "sequence_token" for the same value, whose gradient goes through each token's own
            log-probability (GSPO-token). That differs if advantages or weights vary within a sequence.
        epsilon_low: Lower clip range: ratios below ``1 - epsilon_low`` are clipped (TRL's ``epsilon``). For "gmpo" the
            range of the log-ratio.
        epsilon_high: Upper clip range; None means ``epsilon_low``. For "cispo" the upper bound itself, as in TRL.
        delta: Upper bound of the unclipped ratio (INTELLECT-2's two-sided clipping; verl's dual clip); None means no
            bound.
        beta: Weight of the KL penalty to the reference policy.
        kl_estimator: With ``d = logprob - ref_logprob``: "k1" is ``d``, "k2" or "mse" ``d^2 / 2``, "k3"
            ``exp(-d) - 1 + d``, "abs" ``|d|``. http://joschu.net/blog/kl-approx.html. Or an exact divergence over the
            whole vocabulary: "reverse_kl", of the policy from the reference; "forward_kl", of the reference from the
            policy; "js", Jensen-Shannon (see ``token_divergence``). An exact divergence needs the reference's logits or
            hidden states instead of ``ref_logprobs``, and is not multiplied by the ratio.
        kl_gradient: "naive" is the estimate's own gradient; "straight_through" is k2's, which is unbiased (verl's
            "k3+"); "importance_weighted" is that of the estimate times ``exp(logprob - sg[logprob])``, whose value is 1
            (arXiv:2506.09477, NeMo-RL); it is 0 if anything is clamped.
        use_bias_correction_kl: Multiply the KL estimate by the importance ratio (DeepSeek-V3.2).
        temperature: Divides the logits, in the ops that see logits.
        entropy_coef: Weight of the bonus on the mean token entropy.
        top_entropy_quantile: Share of the tokens that keep a policy term, by highest entropy (arXiv:2506.01939).
        off_policy_mask_threshold: A sequence with a negative advantage leaves the policy term if its mean log-ratio of
            sampler over policy is above this (DeepSeek-V3.2); None means none does.
        rollout_correction: How weights are computed from ``old_logprobs`` and ``sampling_logprobs``. "token_..." takes
            the ratio of each token, "sequence_..." that of the whole sequence. "..._truncate" clamps it (TIS);
            "..._mask" makes it 0 outside of the bounds (MIS; with both bounds "token_mask" is IcePop).
            "geometric_mask": each token's ratio, but 0 in sequences whose geometric mean is outside ("seq-mask-tis").
            None means no correction, or that of ``rollout_is_weights``.
        rollout_clip_min, rollout_clip_max: The bounds of that ratio; None means no bound.
        sapo_temperature_pos, sapo_temperature_neg: ``tau`` by the advantage's sign.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: ``phi(w) = e^lambda w^k e^(-lambda w)`` by the
            advantage's sign.
        clip_cov_ratio, clip_cov_lb, clip_cov_ub: Share of the tokens that "clip_cov" drops, and the range of covariance
            from which they are drawn.
        kl_cov_ratio, kl_cov_coef: Share of the tokens that "kl_cov" penalises, by highest covariance, and the weight of
            the penalty.
        cispo_ratio_low: Lower bound of "cispo"'s weight; None, as in TRL, means none.
        log_ratio_clamp: Bound on either side of a token's log-ratios to the old policy and to the reference; none by
            default. The mean of a sequence is not bounded.
        kl_clamp: Bound of the KL estimate on either side; none by default.
        max_completion_length: The length that "dr_grpo" divides by, in tokens.

    Raises:
        ValueError: A value is outside its range, an option does not apply to the loss type, or "dr_grpo" has no
            ``max_completion_length``.
    """

    loss_type: str = "dapo"
    loss_agg_mode: str | None = None
    importance_sampling_level: str = "token"
    epsilon_low: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    beta: float = 0.0
    kl_estimator: str = "k3"
    kl_gradient: str = "naive"
    use_bias_correction_kl: bool = True
    temperature: float = 1.0
    entropy_coef: float = 0.0
    top_entropy_quantile: float = 1.0
    off_policy_mask_threshold: float | None = None
    rollout_correction: str | None = None
    rollout_clip_min: float | None = None
    rollout_clip_max: float | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    clip_cov_ratio: float = 0.0002
    clip_cov_lb: float = 1.0
    clip_cov_ub: float = 5.0
    kl_cov_ratio: float = 0.0002
    kl_cov_coef: float = 0.1
    cispo_ratio_low: float | None = None
    log_ratio_clamp: float | None = None
    kl_clamp: float | None = None
    max_completion_length: int | None = None

    def __post_init__(self) -> None:
        check_config(self)
        for name in _DERIVED:  # now: torch.compile would see the object change at its first call
            getattr(self, name)

    def __repr__(self) -> str:
        values = ((field.name, getattr(self, field.name), field.default) for field in fields(self))
        changed = (f"{name}={value!r}" for name, value, default in values if value != default)
        return f"GRPOLossConfig({', '.join(changed)})"

    @classmethod
    def verl(cls, /, **options: Any) -> GRPOLossConfig:
        """verl's actor loss by verl 0.9's names: see ``grpo_kernels.integrations.presets.verl``."""
        return cls._translated("verl", options)

    @classmethod
    def nemo_rl(cls, /, **options: Any) -> GRPOLossConfig:
        """NeMo-RL's by the names of NeMo-RL 0.6's ``loss_fn``: see ``grpo_kernels.integrations.presets.nemo_rl``."""
        return cls._translated("nemo_rl", options)

    @classmethod
    def openrlhf(cls, /, **options: Any) -> GRPOLossConfig:
        """OpenRLHF's actor loss by the names of OpenRLHF 0.11: see ``grpo_kernels.integrations.presets.openrlhf``."""
        return cls._translated("openrlhf", options)

    @classmethod
    def trl(cls, /, **options: Any) -> GRPOLossConfig:
        """TRL's by the names of TRL 1.16's ``GRPOConfig``: see ``grpo_kernels.integrations.presets.trl``."""
        return cls._translated("trl", options)

    @classmethod
    def _translated(cls, framework: str, options: dict[str, Any]) -> GRPOLossConfig:
        check_preset(f"GRPOLossConfig.{framework}", PRESETS[framework], options)
        return cls(**PRESETS[framework](**options))

    @computed_once
    def ratio_bounds(self) -> tuple[float, float]:
        """The clip range of the importance ratio."""
        high = self.epsilon_low if self.epsilon_high is None else self.epsilon_high
        if self.loss_type == "cispo":
            return -math.inf if self.cispo_ratio_low is None else self.cispo_ratio_low, high
        if self.loss_type == "gmpo":
            return math.exp(-self.epsilon_low), math.exp(high)
        return (1.0 - self.epsilon_low, 1.0 + high) if self.loss_type in CLIPPED_LOSSES else (-math.inf, math.inf)

    @computed_once
    def aggregation(self) -> str:
        """One of ``LOSS_AGG_MODES``."""
        return self.loss_agg_mode or _DEFAULT_AGGREGATIONS.get(self.loss_type, "token-mean")

    @computed_once
    def level(self) -> Level:
        """Over what an importance ratio is taken."""
        return Level.GEOMETRIC if self.loss_type == "gmpo" else _LEVELS[self.importance_sampling_level]

    @computed_once
    def surrogate(self) -> Surrogate:
        """The per-token objective."""
        return _SURROGATES[self.loss_type]

    @computed_once
    def weights_need_logprobs(self) -> bool:
        """Whether weights depend on the log-probabilities."""
        is_masked = self.top_entropy_quantile < 1 or self.off_policy_mask_threshold is not None
        return is_masked or self.loss_type in ("vespo", "clip_cov", "kl_cov")

    @computed_once
    def has_exact_divergence(self) -> bool:
        """Whether the penalised divergence is computed over the whole vocabulary, and not estimated from the token."""
        return self.beta != 0 and self.kl_estimator in DIVERGENCES

    @computed_once
    def penalty(self) -> Penalty:
        """The divergence that is penalised: from the reference, or "kl_cov"'s from the old policy."""
        if self.loss_type == "kl_cov":
            return Penalty(self.kl_cov_coef, "abs", "naive", False)
        return Penalty(self.beta, self.kl_estimator, self.kl_gradient, self.use_bias_correction_kl)

    @computed_once
    def is_token_local(self) -> bool:
        """Whether a token's gradient coefficient depends on that token alone: one pass over logits is enough."""
        return self.level == Level.TOKEN and not self.weights_need_logprobs

    def code(self) -> LossCode:
        """The flat form for registered ops; ``Option`` and ``Param`` name the positions."""
        return self._code

    @computed_once
    def _code(self) -> LossCode:
        penalty = self.penalty
        options = {
            Option.SURROGATE: int(self.surrogate),
            Option.LEVEL: int(self.level),
            Option.KL_ESTIMATOR: KL_ESTIMATORS.get(penalty.estimator, 0),  # kernels compute no exact divergence
            Option.KL_GRADIENT: KL_GRADIENTS[penalty.gradient],
            Option.BIAS_CORRECTED_KL: int(penalty.is_bias_corrected),
        }
        low, high = self.ratio_bounds
        params = {
            Param.RATIO_LOW: low,
            Param.RATIO_HIGH: high,
            Param.DELTA: math.inf if self.delta is None else self.delta,
            Param.BETA: penalty.weight,
            Param.TEMPERATURE_POS: self.sapo_temperature_pos,
            Param.TEMPERATURE_NEG: self.sapo_temperature_neg,
            Param.LOG_RATIO_CLAMP: math.inf if self.log_ratio_clamp is None else self.log_ratio_clamp,
            Param.KL_CLAMP: math.inf if self.kl_clamp is None else self.kl_clamp,
        }
        return LossCode([options[o] for o in Option], [float(params[p]) for p in Param])


_DERIVED = tuple(name for name, value in vars(GRPOLossConfig).items() if isinstance(value, computed_once))


def check_is_config(config: GRPOLossConfig) -> None:
    """Raises TypeError unless ``config`` is one."""
    if not isinstance(config, GRPOLossConfig):
        raise TypeError(f"config must be a GRPOLossConfig, got {type(config).__name__}")


def reference_share(divergence: str, mixture: float = 0.5) -> float:
    """The share of the reference in a divergence's mixture: 0 for "forward_kl", 1 for "reverse_kl".

    Raises:
        ValueError: The divergence is unknown, or the share of "js" is not in (0, 1).
    """
    check_choice("divergence", divergence, tuple(DIVERGENCES))
    if divergence != "js":
        return DIVERGENCES[divergence]
    check_range("mixture", mixture, "in (0, 1)", lambda value: 0 < value < 1)
    return float(mixture)
