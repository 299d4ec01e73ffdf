"""Checks of a configuration: unknown names, values out of their ranges, and options without an effect."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from grpo_kernels.loss.aggregation import CLIPPED_LOSSES
from grpo_kernels.loss.options import (
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
from grpo_kernels.named_arguments import known_as, likely_meant, refuse_unknown
from grpo_kernels.validation import as_flag, check_number

Config = TypeVar("Config", bound=type)
Preset = Callable[..., dict[str, Any]]


def refuse_unknown_fields(presets: Mapping[str, Preset]) -> Callable[[Config], Config]:
    """Lets a dataclass whose fields are keywords name an unknown one, with what was likely meant.

    A field whose default is True or False must be one of them.

    Args:
        presets: Functions that take other names, by the class method that calls them.
    """

    def decorate(cls: Config) -> Config:
        generated = cls.__init__
        known = frozenset(field.name for field in fields(cls))
        flags = frozenset(field.name for field in fields(cls) if isinstance(field.default, bool))

        @functools.wraps(generated)
        def __init__(self: Any, /, *positional: Any, **values: Any) -> None:
            if positional or not values.keys() <= known:
                unknown = next((name for name in values if name not in known), None)
                raise TypeError(_refusal(cls.__name__, positional, unknown, tuple(generated.__kwdefaults__), presets))
            for name in flags & values.keys():
                values[name] = as_flag(name, values[name])
            generated(self, **values)

        cls.__init__ = __init__
        return cls

    return decorate


def _refusal(
    owner: str, positional: tuple[Any, ...], unknown: str | None, known: tuple[str, ...], presets: Mapping[str, Preset]
) -> str:
    if unknown is None:
        return f"{owner} takes its fields by name, as loss_type=..., got {positional[0]!r} without one"
    synonym = known_as(unknown, known)
    hints = [] if synonym is None else [f"{synonym}=..."]
    hints += [
        f"{owner}.{name}({unknown}=...)"
        for name, preset in sorted(presets.items(), key=lambda item: item[0] != "trl")
        if unknown in inspect.signature(preset).parameters
    ]
    return f"{owner} has no field {unknown!r}{likely_meant(unknown, known, hints)}"


def check_preset(caller: str, preset: Preset, options: Mapping[str, Any]) -> None:
    """Raises TypeError, naming the option, unless the translation of another framework's options takes all of them."""
    refuse_unknown(caller, options, tuple(inspect.signature(preset).parameters))


def check_config(config: Any) -> None:
    """Raises ValueError unless every value is in its range and every changed option has an effect."""
    check_choice("loss_type", config.loss_type, LOSS_TYPES)
    check_choice("loss_agg_mode", config.loss_agg_mode, (None, *LOSS_AGG_MODES))
    check_choice("importance_sampling_level", config.importance_sampling_level, IMPORTANCE_SAMPLING_LEVELS)
    check_choice("kl_estimator", config.kl_estimator, (*KL_ESTIMATORS, *DIVERGENCES))
    check_choice("kl_gradient", config.kl_gradient, tuple(KL_GRADIENTS))
    check_choice("rollout_correction", config.rollout_correction, (None, *ROLLOUT_CORRECTIONS))
    for name in ("epsilon_low", "epsilon_high", "beta", "rollout_clip_min", "cispo_ratio_low"):
        _check_field(config, name, "at least 0", lambda value: value >= 0)
    for name in ("delta", "temperature", "rollout_clip_max", "log_ratio_clamp", "kl_clamp", "max_completion_length"):
        _check_field(config, name, "greater than 0", lambda value: value > 0)
    for name in _OPTIONS_OF_ONE_LOSS:
        _check_field(config, name, "greater than 0", lambda value: value > 0)
    for name in ("entropy_coef", "off_policy_mask_threshold"):
        _check_field(config, name, "", lambda value: True)
    _check_field(config, "top_entropy_quantile", "in (0, 1]", lambda value: 0 < value <= 1)
    if config.aggregation == "seq-mean-token-sum-norm" and config.max_completion_length is None:
        name = "loss_type" if config.loss_agg_mode is None else "loss_agg_mode"
        raise ValueError(f'max_completion_length must be given for {name}="{getattr(config, name)}", got None')
    if config.loss_type == "gmpo" and max(config.epsilon_low, config.epsilon_high or 0.0) > _LARGEST_LOG_BOUND:
        raise ValueError(
            f'epsilon_low and epsilon_high must be at most {_LARGEST_LOG_BOUND:g} with loss_type="gmpo", whose '
            f"log-ratios they bound, got {config.epsilon_low!r} and {config.epsilon_high!r}"
        )
    _check_all_apply(config)


_LARGEST_LOG_BOUND = 80.0  # its exponential is finite in fp32
#: Options of a single loss type.
_OPTIONS_OF_ONE_LOSS = {
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


def _check_all_apply(config: Any) -> None:
    changed = {field.name for field in fields(config) if getattr(config, field.name) != field.default}

    def refuse(names: Iterable[str], other: str) -> None:
        for name in names:
            if name in changed:
                raise ValueError(f"{name} has no effect with {other}, got {getattr(config, name)!r}")

    loss_type = f'loss_type="{config.loss_type}"'
    refuse((name for name, owner in _OPTIONS_OF_ONE_LOSS.items() if owner != config.loss_type), loss_type)
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
    if config.loss_type not in CLIPPED_LOSSES:
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


def _check_field(config: Any, name: str, what: str, is_within: Callable[[float], bool]) -> None:
    value = getattr(config, name)
    if value is not config.__dataclass_fields__[name].default:
        check_range(name, value, what, is_within)


def check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raises ValueError unless ``value`` is one of those that are allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_range(name: str, value: Any, what: str, is_within: Callable[[float], bool]) -> None:
    """Raises TypeError or ValueError unless ``value`` is a finite number for which ``is_within`` holds."""
    check_number(name, value)
    if not (math.isfinite(value) and is_within(value)):
        raise ValueError(f"{name} must be finite{f' and {what}' if what else ''}, got {value!r}")
