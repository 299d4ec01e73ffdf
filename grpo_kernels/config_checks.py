"""What a loss configuration must be: every value in its range, every option given with an effect."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import TYPE_CHECKING

from grpo_kernels.options import (
    CLIPPED_LOSS_TYPES,
    DIVERGENCES,
    IMPORTANCE_SAMPLING_LEVELS,
    KL_ESTIMATORS,
    KL_GRADIENTS,
    LOSS_AGG_MODES,
    LOSS_TYPES,
    ROLLOUT_CORRECTIONS,
    Level,
    Surrogate,
)

if TYPE_CHECKING:
    from grpo_kernels.config import GRPOLossConfig


def mixture_of(divergence: str, mixture: float = 0.5) -> float:
    """A divergence as the share of the reference in its mixture: 0 "forward_kl", 1 "reverse_kl".

    Raises:
        ValueError: The divergence is unknown, or the share of "js" is not in (0, 1).
    """
    _one_of("divergence", divergence, tuple(DIVERGENCES))
    if divergence != "js":
        return DIVERGENCES[divergence]
    _within("mixture", mixture, "in (0, 1)", lambda value: 0 < value < 1)
    return float(mixture)


def check(config: GRPOLossConfig) -> None:
    """Raises ValueError unless every value is in its range and every option given has an effect."""
    _one_of("loss_type", config.loss_type, LOSS_TYPES)
    _one_of("loss_agg_mode", config.loss_agg_mode, (None, *LOSS_AGG_MODES))
    _one_of("importance_sampling_level", config.importance_sampling_level, IMPORTANCE_SAMPLING_LEVELS)
    _one_of("kl_estimator", config.kl_estimator, (*KL_ESTIMATORS, *DIVERGENCES))
    _one_of("kl_gradient", config.kl_gradient, tuple(KL_GRADIENTS))
    _one_of("rollout_correction", config.rollout_correction, (None, *ROLLOUT_CORRECTIONS))
    for name in ("epsilon_low", "epsilon_high", "beta", "rollout_clip_min", "cispo_ratio_low"):
        _within(name, getattr(config, name), "at least 0", lambda value: value >= 0)
    for name in ("delta", "temperature", "rollout_clip_max", "log_ratio_clamp", "kl_clamp", "max_completion_length"):
        _within(name, getattr(config, name), "greater than 0", lambda value: value > 0)
    for name in _OF_ONE_TYPE:
        _within(name, getattr(config, name), "greater than 0", lambda value: value > 0)
    for name in ("entropy_coef", "off_policy_mask_threshold"):
        _within(name, getattr(config, name), "", lambda value: True)
    _within("top_entropy_quantile", config.top_entropy_quantile, "in (0, 1]", lambda value: 0 < value <= 1)
    if config.aggregation == "seq-mean-token-sum-norm" and config.max_completion_length is None:
        name = "loss_type" if config.loss_agg_mode is None else "loss_agg_mode"
        raise ValueError(f'max_completion_length must be given for {name}="{getattr(config, name)}", got None')
    if config.loss_type == "gmpo" and max(config.epsilon_low, config.epsilon_high or 0.0) > _LARGEST_LOG_BOUND:
        raise ValueError(
            f'epsilon_low and epsilon_high must be at most {_LARGEST_LOG_BOUND:g} with loss_type="gmpo", whose '
            f"log-ratios they bound, got {config.epsilon_low!r} and {config.epsilon_high!r}"
        )
    _check_that_all_apply(config)


_LARGEST_LOG_BOUND = 80.0  # whose exponential is finite in fp32
#: Options that one loss type alone has.
_OF_ONE_TYPE = {
    "sapo_temperature_pos": "sapo",
    "sapo_temperature_neg": "sapo",
    "vespo_k_pos": "vespo",
    "vespo_lambda_pos": "vespo",
    "vespo_k_neg": "vespo",
    "vespo_lambda_neg": "vespo",
    "clip_cov_ratio": "clip_cov",
    "clip_cov_lb": "clip_cov",
    "clip_cov_ub": "clip_cov",
    "kl_cov_ratio": "kl_cov",
    "kl_cov_coef": "kl_cov",
}


def _check_that_all_apply(config: GRPOLossConfig) -> None:
    defaults = {field.name: field.default for field in fields(config)}
    given = {name for name, default in defaults.items() if getattr(config, name) != default}

    def refuse(names: Iterable[str], other: str) -> None:
        for name in names:
            if name in given:
                raise ValueError(f"{name} has no effect with {other}, got {getattr(config, name)!r}")

    loss_type = f'loss_type="{config.loss_type}"'
    refuse((name for name, owner in _OF_ONE_TYPE.items() if owner != config.loss_type), loss_type)
    if config.loss_type != "cispo":
        refuse(("cispo_ratio_low",), loss_type)
    elif config.epsilon_high is not None:
        refuse(("epsilon_low",), f"{loss_type} and epsilon_high={config.epsilon_high}")
    if config.loss_type == "kl_cov":
        refuse(("beta",), loss_type)
    without_ratio = "beta=0"
    if config.has_exact_divergence:
        without_ratio = f'kl_estimator="{config.kl_estimator}"'
        refuse(("kl_gradient", "kl_clamp"), without_ratio)
    if config.surrogate == Surrogate.LOGPROB and (config.beta == 0 or config.has_exact_divergence):
        refuse(("log_ratio_clamp",), f"{without_ratio} and {loss_type}")
    if config.loss_agg_mode is not None and config.entropy_coef != 0:
        refuse(("top_entropy_quantile",), f'loss_agg_mode="{config.loss_agg_mode}" and an entropy bonus')
    if config.loss_type not in CLIPPED_LOSS_TYPES:
        refuse(("delta",), loss_type)
    if config.loss_type in ("vespo", "gmpo", "reinforce", "clip_cov", "kl_cov"):
        refuse(("importance_sampling_level",), loss_type)
    if config.loss_type in ("surrogate", "kl_cov", "sapo", "vespo", "reinforce"):
        refuse(("epsilon_low", "epsilon_high"), loss_type)
    if config.loss_type == "gmpo":
        refuse(("top_entropy_quantile", "loss_agg_mode"), loss_type)
    if config.level != Level.TOKEN and (config.beta == 0 or config.has_exact_divergence):
        refuse(("log_ratio_clamp",), f"{without_ratio} and a ratio of sequences ({loss_type}, {config.level.name})")
    if config.beta == 0:
        refuse(("kl_estimator", "kl_gradient", "kl_clamp"), "beta=0")
    if config.kl_gradient != "naive" and config.use_bias_correction_kl:
        raise ValueError(f'use_bias_correction_kl must be False with kl_gradient="{config.kl_gradient}", got True')
    if config.rollout_correction is None:
        refuse(("rollout_clip_min", "rollout_clip_max"), "rollout_correction=None")
    elif config.rollout_correction.endswith("truncate") and config.rollout_clip_min == config.rollout_clip_max is None:
        raise ValueError(
            "rollout_clip_min or rollout_clip_max must be given with "
            f'rollout_correction="{config.rollout_correction}", got neither'
        )
    elif None not in (low := config.rollout_clip_min, high := config.rollout_clip_max) and low > high:
        raise ValueError(f"rollout_clip_min must be at most rollout_clip_max={high}, got {low}")
    elif config.loss_type == "vespo" and config.rollout_correction.startswith("sequence"):
        raise ValueError(f"rollout_correction must be of tokens with {loss_type}, got {config.rollout_correction!r}")


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _within(name: str, value: float | None, what: str, is_within: Callable[[float], bool]) -> None:
    if value is not None and not (math.isfinite(value) and is_within(value)):
        raise ValueError(f"{name} must be finite{' and ' * bool(what)}{what}, got {value!r}")
