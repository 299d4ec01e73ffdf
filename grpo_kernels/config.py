"""The loss configuration: TRL's names and defaults, validated once, and its flat form for kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")
IMPORTANCE_SAMPLING_LEVELS = ("token", "sequence")
KL_ESTIMATORS = ("k3",)


class Surrogate(IntEnum):
    """The per-token objective. Loss types that differ in their weights alone share one; mirrored in policy_math.h."""

    CLIP = 0


class Option(IntEnum):
    """Position of each integer option in ``PolicyLossCode.options``; mirrored in policy_math.h."""

    SURROGATE = 0
    SEQUENCE_LEVEL = 1
    KL_ESTIMATOR = 2
    BIAS_CORRECTED_KL = 3


class Param(IntEnum):
    """Position of each real parameter in ``PolicyLossCode.params``; mirrored in policy_math.h."""

    RATIO_LOW = 0  # 1 - epsilon_low
    RATIO_HIGH = 1  # 1 + epsilon_high
    DELTA = 2  # infinity when absent
    BETA = 3


_SURROGATE_OF = dict.fromkeys(LOSS_TYPES, Surrogate.CLIP)


@dataclass(frozen=True)
class PolicyLossCode:
    """A configuration as it crosses into kernels: what to compute per token, without any reduction."""

    options: list[int]
    params: list[float]


@dataclass(frozen=True, kw_only=True)
class GRPOLossConfig:
    """What the GRPO family of losses computes. Names and defaults are TRL 1.16's.

    Args:
        loss_type: Which weights reduce the per-token loss to a scalar: "grpo" is the mean over sequences of each
            sequence's token mean, "bnpo" the mean over local tokens, "dr_grpo" divides by ``max_completion_length``
            times the number of sequences, "dapo" by ``num_items_in_batch``.
        importance_sampling_level: "token", or "sequence" for one ratio a sequence (GSPO, arXiv:2507.18071).
        epsilon_low: Lower clip range: ratios below ``1 - epsilon_low`` are clipped (TRL's ``epsilon``).
        epsilon_high: Upper clip range; None means ``epsilon_low``.
        delta: Upper bound of the unclipped ratio (INTELLECT-2's two-sided clipping); None means no bound.
        beta: Weight of the KL penalty to the reference policy.
        kl_estimator: "k3", http://joschu.net/blog/kl-approx.html.
        use_bias_correction_kl: Multiply the KL estimate by the importance ratio (DeepSeek-V3.2).
        temperature: Divides the logits, in the ops that see logits.
        entropy_coef: Weight of the bonus on the mean token entropy.
        max_completion_length: The length that "dr_grpo" divides by, in tokens.

    Raises:
        ValueError: A value is outside its range, or "dr_grpo" has no ``max_completion_length``.
    """

    loss_type: str = "dapo"
    importance_sampling_level: str = "token"
    epsilon_low: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    beta: float = 0.0
    kl_estimator: str = "k3"
    use_bias_correction_kl: bool = True
    temperature: float = 1.0
    entropy_coef: float = 0.0
    max_completion_length: int | None = None

    def __post_init__(self) -> None:
        _one_of("loss_type", self.loss_type, LOSS_TYPES)
        _one_of("importance_sampling_level", self.importance_sampling_level, IMPORTANCE_SAMPLING_LEVELS)
        _one_of("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        _at_least_zero("epsilon_low", self.epsilon_low)
        if self.epsilon_high is not None:
            _at_least_zero("epsilon_high", self.epsilon_high)
        if self.delta is not None:
            _positive("delta", self.delta)
        _at_least_zero("beta", self.beta)
        _positive("temperature", self.temperature)
        if not math.isfinite(self.entropy_coef):
            raise ValueError(f"entropy_coef must be finite, got {self.entropy_coef!r}")
        if self.max_completion_length is not None:
            _positive("max_completion_length", self.max_completion_length)
        elif self.loss_type == "dr_grpo":
            raise ValueError('max_completion_length must be given for loss_type="dr_grpo", got None')

    @property
    def ratio_bounds(self) -> tuple[float, float]:
        """The clip range of the importance ratio."""
        high = self.epsilon_low if self.epsilon_high is None else self.epsilon_high
        return 1.0 - self.epsilon_low, 1.0 + high

    @property
    def is_token_local(self) -> bool:
        """Whether a token's gradient coefficient needs that token alone, so that one pass over logits suffices."""
        return self.importance_sampling_level == "token"

    def code(self) -> PolicyLossCode:
        """The flat form that crosses into registered ops; ``Option`` and ``Param`` name the positions."""
        options = {
            Option.SURROGATE: int(_SURROGATE_OF[self.loss_type]),
            Option.SEQUENCE_LEVEL: int(self.importance_sampling_level == "sequence"),
            Option.KL_ESTIMATOR: KL_ESTIMATORS.index(self.kl_estimator),
            Option.BIAS_CORRECTED_KL: int(self.use_bias_correction_kl),
        }
        low, high = self.ratio_bounds
        params = {
            Param.RATIO_LOW: low,
            Param.RATIO_HIGH: high,
            Param.DELTA: math.inf if self.delta is None else self.delta,
            Param.BETA: self.beta,
        }
        return PolicyLossCode([options[o] for o in Option], [float(params[p]) for p in Param])


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _at_least_zero(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and at least 0, got {value!r}")


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be finite and greater than 0, got {value!r}")
