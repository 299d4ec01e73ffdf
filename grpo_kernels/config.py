"""The loss configuration: TRL's names and defaults, validated once, and its flat form for kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from grpo_kernels import presets
from grpo_kernels.config_checks import check
from grpo_kernels.options import (
    CLIPPED_LOSS_TYPES,
    DIVERGENCES,
    IMPORTANCE_SAMPLING_LEVELS,
    KL_ESTIMATORS,
    KL_GRADIENTS,
    Level,
    Option,
    Param,
    Surrogate,
)

#: The mean that is a loss type's own: those of verl's name count every sequence here. The others are "token-mean".
_MEAN_OF = {
    "grpo": "seq-mean-token-mean",
    "sapo": "seq-mean-token-mean",
    "gmpo": "seq-mean-token-mean",
    "luspo": "seq-mean-token-sum",
    "dr_grpo": "seq-mean-token-sum-norm",
}
_SURROGATE_OF = dict.fromkeys((*CLIPPED_LOSS_TYPES, "surrogate", "kl_cov", "gmpo"), Surrogate.CLIP) | {
    "cispo": Surrogate.CISPO,
    "sapo": Surrogate.SAPO,
    "vespo": Surrogate.LOGPROB,
    "reinforce": Surrogate.LOGPROB,
}
_LEVEL_OF = dict(zip(IMPORTANCE_SAMPLING_LEVELS, (Level.TOKEN, Level.SEQUENCE, Level.SEQUENCE_TOKEN), strict=True))


@dataclass(frozen=True)
class PolicyLossCode:
    """A configuration as it crosses into kernels: what to compute per token, without any reduction."""

    options: list[int]
    params: list[float]


class Penalty(NamedTuple):
    """A penalised divergence: its weight, the names of its estimator and of that one's gradient."""

    weight: float
    estimator: str
    gradient: str
    is_bias_corrected: bool


@dataclass(frozen=True, kw_only=True)
class GRPOLossConfig:
    """What the GRPO family of losses computes. Names and defaults are TRL 1.16's.

    The loss types, by their objective of a token, ``A`` its advantage, and by their mean:

    - "grpo", "bnpo", "dr_grpo", "dapo", "luspo", "ppo": the clipped ratio times ``A``. The mean over sequences of each
      one's token mean; over local tokens; ``max_completion_length`` times the number of sequences as divisor;
      ``num_items_in_batch`` as divisor; the mean over sequences of each one's sum (arXiv:2602.05261); as "bnpo".
    - "surrogate": the ratio times ``A``, unclipped, as "dapo".
    - "clip_cov", "kl_cov": as "dapo" and as "surrogate", but where log-probabilities and advantages vary together the
      most: there some tokens, drawn at random, leave the policy term, or ``|log ratio|`` is a penalty
      (arXiv:2505.22617).
    - "cispo": ``clip(ratio) A logprob``, its weight detached, as "dapo" (arXiv:2506.13585).
    - "sapo": ``4 / tau sigmoid(tau (ratio - 1)) A``, as "grpo" (arXiv:2511.20347).
    - "vespo": ``phi A logprob``, ``phi`` a detached weight by the sequence's ratio, as "dapo".
    - "gmpo": the geometric mean of a sequence's ratios, clipped in log space, times ``A``; the mean over sequences
      (arXiv:2507.20673).
    - "reinforce": ``A logprob``, as "dapo".

    Args:
        loss_type: One of the above.
        loss_agg_mode: verl's name of a mean, in the place of the loss type's own, for the policy term, the KL and the
            entropy bonus alike; sequences without a token do not count. "seq-mean-token-sum-norm" divides by
            ``max_completion_length``. None means the loss type's.
        importance_sampling_level: "token"; "sequence" for one ratio a sequence, the exponential of its mean log-ratio
            (GSPO, arXiv:2507.18071); "sequence_token" for that value with a gradient through each token's own
            (GSPO-token), which differs where advantages or weights do within a sequence.
        epsilon_low: Lower clip range: ratios below ``1 - epsilon_low`` are clipped (TRL's ``epsilon``). Of "gmpo" the
            range of the log-ratio.
        epsilon_high: Upper clip range; None means ``epsilon_low``. Of "cispo" the upper bound itself, as in TRL.
        delta: Upper bound of the unclipped ratio (INTELLECT-2's two-sided clipping; verl's dual clip); None means no
            bound.
        beta: Weight of the KL penalty to the reference policy.
        kl_estimator: With ``d = logprob - ref_logprob``: "k1" is ``d``, "k2" or "mse" ``d^2 / 2``, "k3"
            ``exp(-d) - 1 + d``, "abs" ``|d|``. http://joschu.net/blog/kl-approx.html. Or none, but the divergence
            itself, over the whole vocabulary: "reverse_kl", the policy's from the reference, "forward_kl", the
            reference's from the policy, "js", Jensen's and Shannon's (see ``token_divergence``). It takes the
            reference's logits, or hidden states, in the place of ``ref_logprobs``, and knows of no ratio.
        kl_gradient: "naive" is the estimate's own; "straight_through" is k2's, which is unbiased (verl's "k3+");
            "importance_weighted" is that of the estimate times ``exp(logprob - sg[logprob])``, which is 1
            (arXiv:2506.09477, NeMo-RL); it is 0 where anything is clamped.
        use_bias_correction_kl: Multiply the KL estimate by the importance ratio (DeepSeek-V3.2).
        temperature: Divides the logits, in the ops that see logits.
        entropy_coef: Weight of the bonus on the mean token entropy.
        top_entropy_quantile: Share of the tokens, those of highest entropy, that keep a policy term (arXiv:2506.01939).
        off_policy_mask_threshold: A sequence with a negative advantage whose mean log-ratio of sampler over policy is
            above it leaves the policy term (DeepSeek-V3.2); None means none does.
        rollout_correction: How weights are made of ``old_logprobs`` and ``sampling_logprobs``: the ratio of a
            "token_..." or of a whole "sequence_...", clamped ("..._truncate", TIS) or, outside of the bounds, 0
            ("..._mask", MIS; at tokens and with both bounds IcePop). "geometric_mask": a token's ratio, 0 in sequences
            whose geometric mean of them is outside ("seq-mask-tis"). None means no correction, or weights as given.
        rollout_clip_min, rollout_clip_max: Its bounds; None means no bound.
        sapo_temperature_pos, sapo_temperature_neg: ``tau`` by the advantage's sign.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: ``phi(w) = e^lambda w^k e^(-lambda w)`` by the
            advantage's sign.
        clip_cov_ratio, clip_cov_lb, clip_cov_ub: Share of the tokens that leave "clip_cov", and between which
            covariances they are drawn.
        kl_cov_ratio, kl_cov_coef: Share of the tokens that "kl_cov" penalises, those of highest covariance, and the
            penalty's weight.
        cispo_ratio_low: Lower bound of "cispo"'s weight; None, as in TRL, means none.
        log_ratio_clamp: Bound of a token's log-ratios, to the old policy and to the reference, on either side; none by
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
        check(self)

    @classmethod
    def verl(cls, **options: Any) -> GRPOLossConfig:
        """verl's actor loss by verl 0.9's names: see ``grpo_kernels.presets.verl``."""
        return cls(**presets.verl(**options))

    @classmethod
    def nemo_rl(cls, **options: Any) -> GRPOLossConfig:
        """NeMo-RL's by the names of NeMo-RL 0.6's ``loss_fn``: see ``grpo_kernels.presets.nemo_rl``."""
        return cls(**presets.nemo_rl(**options))

    @classmethod
    def openrlhf(cls, **options: Any) -> GRPOLossConfig:
        """OpenRLHF's actor loss by the names of OpenRLHF 0.11: see ``grpo_kernels.presets.openrlhf``."""
        return cls(**presets.openrlhf(**options))

    @classmethod
    def trl(cls, **options: Any) -> GRPOLossConfig:
        """TRL's by the names of TRL 1.16's ``GRPOConfig``: see ``grpo_kernels.presets.trl``."""
        return cls(**presets.trl(**options))

    @property
    def ratio_bounds(self) -> tuple[float, float]:
        """The clip range of the importance ratio."""
        high = self.epsilon_low if self.epsilon_high is None else self.epsilon_high
        if self.loss_type == "cispo":
            return -math.inf if self.cispo_ratio_low is None else self.cispo_ratio_low, high
        if self.loss_type == "gmpo":
            return math.exp(-self.epsilon_low), math.exp(high)
        return (1.0 - self.epsilon_low, 1.0 + high) if self.loss_type in CLIPPED_LOSS_TYPES else (-math.inf, math.inf)

    @property
    def aggregation(self) -> str:
        """One of ``LOSS_AGG_MODES``."""
        return self.loss_agg_mode or _MEAN_OF.get(self.loss_type, "token-mean")

    @property
    def level(self) -> Level:
        """What an importance ratio is of."""
        return Level.GEOMETRIC if self.loss_type == "gmpo" else _LEVEL_OF[self.importance_sampling_level]

    @property
    def surrogate(self) -> Surrogate:
        """The per-token objective."""
        return _SURROGATE_OF[self.loss_type]

    @property
    def has_settled_weights(self) -> bool:
        """Whether tokens' weights are known before any log-probability is."""
        is_masked = self.top_entropy_quantile < 1 or self.off_policy_mask_threshold is not None
        return not is_masked and self.loss_type not in ("vespo", "clip_cov", "kl_cov")

    @property
    def has_exact_divergence(self) -> bool:
        """Whether the penalised divergence is that of whole distributions, rather than estimated from a token."""
        return self.beta != 0 and self.kl_estimator in DIVERGENCES

    @property
    def penalty(self) -> Penalty:
        """The divergence that is penalised: from the reference, or "kl_cov"'s from the old policy."""
        if self.loss_type == "kl_cov":
            return Penalty(self.kl_cov_coef, "abs", "naive", False)
        return Penalty(self.beta, self.kl_estimator, self.kl_gradient, self.use_bias_correction_kl)

    @property
    def is_token_local(self) -> bool:
        """Whether a token's gradient coefficient needs that token alone, so that one pass over logits suffices."""
        return self.level == Level.TOKEN and self.has_settled_weights

    def code(self) -> PolicyLossCode:
        """The flat form that crosses into registered ops; ``Option`` and ``Param`` name the positions."""
        penalty = self.penalty
        options = {
            Option.SURROGATE: int(self.surrogate),
            Option.LEVEL: int(self.level),
            Option.KL_ESTIMATOR: KL_ESTIMATORS.get(penalty.estimator, 0),  # an exact divergence is no kernel's
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
        return PolicyLossCode([options[o] for o in Option], [float(params[p]) for p in Param])
