"""Other frameworks' options, by their names and with their defaults, as those of ``GRPOLossConfig``.

A name is that of the framework's own configuration, and an option that the framework has and ours does not is a
``TypeError``, as for any function. Each preset says which release it follows.
"""

from __future__ import annotations

from typing import Any

_TRL_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
_VERL_MEANS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


def trl(
    *,
    loss_type: str = "dapo",
    importance_sampling_level: str = "token",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    use_bias_correction_kl: bool = True,
    temperature: float = 1.0,
    entropy_coef: float = 0.0,
    top_entropy_quantile: float = 1.0,
    off_policy_mask_threshold: float | None = None,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    max_completion_length: int | None = 512,
    vllm_importance_sampling_correction: bool = False,
    vllm_importance_sampling_mode: str = "sequence_mask",
    vllm_importance_sampling_clip_min: float | None = None,
    vllm_importance_sampling_clip_max: float | None = 3.0,
) -> dict[str, Any]:
    """TRL 1.16's ``GRPOConfig``. TRL passes over options that its loss type does not have; so does this.

    ``vllm_importance_sampling_correction`` is on by default in TRL, where it needs ``use_vllm``: here it is off.
    """
    if loss_type not in _TRL_LOSS_TYPES:
        raise ValueError(f"loss_type must be one of {', '.join(map(repr, _TRL_LOSS_TYPES))}, got {loss_type!r}")
    if loss_type == "vespo" and importance_sampling_level != "token":
        raise ValueError(f'importance_sampling_level must be "token" with vespo, got {importance_sampling_level!r}')
    options: dict[str, Any] = {
        "loss_type": loss_type,
        "beta": beta,
        "use_bias_correction_kl": use_bias_correction_kl,
        "temperature": temperature,
        "entropy_coef": entropy_coef,
        "top_entropy_quantile": top_entropy_quantile,
        "off_policy_mask_threshold": off_policy_mask_threshold,
        "max_completion_length": max_completion_length,
    }
    if loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo"):
        options |= {"epsilon_low": epsilon, "epsilon_high": epsilon_high, "delta": delta}
    if loss_type == "cispo":
        options["epsilon_high"] = epsilon if epsilon_high is None else epsilon_high
    if loss_type == "sapo":
        options |= {"sapo_temperature_pos": sapo_temperature_pos, "sapo_temperature_neg": sapo_temperature_neg}
    if loss_type == "vespo":
        options |= {"vespo_k_pos": vespo_k_pos, "vespo_lambda_pos": vespo_lambda_pos}
        options |= {"vespo_k_neg": vespo_k_neg, "vespo_lambda_neg": vespo_lambda_neg}
    else:
        options["importance_sampling_level"] = importance_sampling_level
    if vllm_importance_sampling_correction:
        options["rollout_correction"] = vllm_importance_sampling_mode
        options["rollout_clip_min"] = vllm_importance_sampling_clip_min
        options["rollout_clip_max"] = vllm_importance_sampling_clip_max
    return options


_VERL_LOSS_TYPES = {
    "vanilla": "dapo",
    "gspo": "dapo",
    "gpg": "reinforce",
    "sapo": "sapo",
    "cispo": "cispo",
    "geo_mean": "gmpo",
    "clip_cov": "clip_cov",
    "kl_cov": "kl_cov",
}
_VERL_ESTIMATORS = {"kl": "k1", "low_var_kl": "k3"}


def verl(
    *,
    loss_mode: str = "vanilla",
    loss_agg_mode: str = "token-mean",
    loss_scale_factor: int | None = None,
    clip_ratio: float = 0.2,
    clip_ratio_low: float | None = 0.2,
    clip_ratio_high: float | None = 0.2,
    clip_ratio_c: float = 3.0,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    clip_cov_ratio: float = 0.0002,
    clip_cov_lb: float = 1.0,
    clip_cov_ub: float = 5.0,
    kl_cov_ratio: float = 0.0002,
    ppo_kl_coef: float = 0.1,
    use_kl_loss: bool = False,
    kl_loss_coef: float = 0.001,
    kl_loss_type: str = "low_var_kl",
    entropy_coeff: float = 0.0,
    temperature: float = 1.0,
) -> dict[str, Any]:
    """verl 0.9.1: the loss modes "vanilla", "gspo", "gpg", "sapo", "cispo", "geo_mean", "clip_cov" and "kl_cov".

    Of verl's own: ``clip_ratio`` is taken where the other two are None; CISPO clips on both sides; the dual clip
    ``clip_ratio_c`` is always on; log-ratios are clamped to 20, and k3 to 10 (ours clamps those of the other
    estimators too, verl does not); the KL penalty and the entropy bonus have the mean ``loss_agg_mode``. "sapo" and
    "geo_mean" have one of their own, so with another these two are refused, as "kl_cov" refuses a KL penalty. Of
    "gspo" verl clamps the sequence's log-ratio to 10 at most: ours is not clamped. Of rollout weights "geo_mean" takes
    the geometric mean there, here each token's. ``loss_scale_factor``, in verl the longest completion's length by
    default, must be given for "seq-mean-token-sum-norm".

    Raises:
        ValueError: The mode or the mean is unknown, the two do not go together, or ``clip_ratio_c`` does not lie above
            the clip range.
    """
    if loss_mode not in _VERL_LOSS_TYPES:
        raise ValueError(f"loss_mode must be one of {', '.join(map(repr, _VERL_LOSS_TYPES))}, got {loss_mode!r}")
    if loss_agg_mode not in _VERL_MEANS:
        raise ValueError(f"loss_agg_mode must be one of {', '.join(map(repr, _VERL_MEANS))}, got {loss_agg_mode!r}")
    if loss_agg_mode == "seq-mean-token-sum-norm" and loss_scale_factor is None:
        raise ValueError('loss_scale_factor must be given for loss_agg_mode="seq-mean-token-sum-norm", got None')
    use_kl_loss = use_kl_loss and kl_loss_coef != 0
    has_own_mean = loss_mode == "geo_mean" or (loss_mode == "sapo" and loss_agg_mode != "seq-mean-token-mean")
    if (has_own_mean and (use_kl_loss or entropy_coeff)) or (loss_mode == "kl_cov" and use_kl_loss):
        raise ValueError(f'loss_mode="{loss_mode}" with loss_agg_mode="{loss_agg_mode}" takes no KL penalty or bonus')
    low = clip_ratio if clip_ratio_low is None else clip_ratio_low
    high = clip_ratio if clip_ratio_high is None else clip_ratio_high
    options: dict[str, Any] = {
        "loss_type": _VERL_LOSS_TYPES[loss_mode],
        "entropy_coef": entropy_coeff,
        "temperature": temperature,
        "use_bias_correction_kl": False,
        "max_completion_length": loss_scale_factor,
    }
    if loss_mode == "sapo":
        options |= {"loss_agg_mode": "seq-mean-token-mean", "sapo_temperature_pos": tau_pos}
        options["sapo_temperature_neg"] = tau_neg
    elif loss_mode != "geo_mean":
        options["loss_agg_mode"] = loss_agg_mode
    if loss_mode == "clip_cov":
        options |= {"clip_cov_ratio": clip_cov_ratio, "clip_cov_lb": clip_cov_lb, "clip_cov_ub": clip_cov_ub}
    if loss_mode == "kl_cov":
        options |= {"kl_cov_ratio": kl_cov_ratio, "kl_cov_coef": ppo_kl_coef}
    if loss_mode in ("vanilla", "gspo", "geo_mean", "clip_cov"):
        options |= {"epsilon_low": low, "epsilon_high": high}
    if loss_mode == "vanilla":
        options |= _dual_clip("clip_ratio_c", clip_ratio_c, high)
    if loss_mode == "gspo":
        options["importance_sampling_level"] = "sequence_token"
    if loss_mode == "cispo":
        options |= {"cispo_ratio_low": 1 - low if low < 1 else None, "epsilon_high": 1 + high}
    if loss_mode in ("vanilla", "sapo", "cispo"):
        options["log_ratio_clamp"] = 20.0
    if use_kl_loss:
        base = kl_loss_type.removesuffix("+")
        options |= {"beta": kl_loss_coef, "kl_estimator": _VERL_ESTIMATORS.get(base, base)}
        if base != kl_loss_type:
            options["kl_gradient"] = "straight_through"
        if options["kl_estimator"] == "k3":
            options |= {"kl_clamp": 10.0, "log_ratio_clamp": 20.0}
    return options


_CORRECTIONS = {"tis": "truncate", "icepop": "mask"}


def nemo_rl(
    *,
    disable_ppo_ratio: bool = False,
    token_level_loss: bool = True,
    sequence_level_importance_ratios: bool = False,
    ratio_clip_min: float = 0.2,
    ratio_clip_max: float = 0.2,
    ratio_clip_c: float | None = None,
    use_cispo: bool = False,
    reference_policy_kl_penalty: float = 0.01,
    reference_policy_kl_type: str = "k3",
    kl_input_clamp_value: float | None = 20.0,
    kl_output_clamp_value: float | None = 10.0,
    use_kl_in_reward: bool = False,
    use_importance_sampling_correction: bool = False,
    truncated_importance_sampling_type: str | None = None,
    truncated_importance_sampling_ratio: float | None = None,
    truncated_importance_sampling_ratio_min: float | None = None,
    temperature: float = 1.0,
) -> dict[str, Any]:
    """NeMo-RL 0.6's ``ClippedPGLossFn``.

    Of NeMo-RL's own: the KL is weighted by ``exp(l - sg[l])``, log-ratios to the reference are clamped to
    ``kl_input_clamp_value`` (ours clamps those to the old policy too, which for 20 tells ratios beyond ``e^20`` apart)
    and the estimate to ``kl_output_clamp_value``. A token that the sampler did not score (NaN) has weight 0 there, and
    is not corrected here. ``force_on_policy_ratio`` without a correction is ``old_logprobs=None``;
    ``use_on_policy_kl_approximation`` and the positive-example loss have no counterpart here.

    Raises:
        ValueError: Options that NeMo-RL refuses together, or an unknown type of truncation.
    """
    if sequence_level_importance_ratios and token_level_loss:
        raise ValueError("token_level_loss must be False with sequence_level_importance_ratios=True, got True")
    if use_cispo and (disable_ppo_ratio or sequence_level_importance_ratios or not token_level_loss):
        raise ValueError("use_cispo=True takes token-level ratios and a token-level loss")
    if use_cispo and ratio_clip_c is not None:
        raise ValueError(f"ratio_clip_c must be None with use_cispo=True, got {ratio_clip_c!r}")
    kinds = (None, *_CORRECTIONS, "seq-mask-tis")
    if truncated_importance_sampling_type not in kinds:
        raise ValueError(
            f"truncated_importance_sampling_type must be one of {', '.join(map(repr, kinds))}, "
            f"got {truncated_importance_sampling_type!r}"
        )
    has_bound = truncated_importance_sampling_ratio is not None
    if truncated_importance_sampling_type is None and (
        has_bound or truncated_importance_sampling_ratio_min is not None
    ):
        raise ValueError("truncated_importance_sampling_type must be given with bounds, got None")
    if truncated_importance_sampling_type is not None:
        if not use_importance_sampling_correction:
            raise ValueError("use_importance_sampling_correction must be True for a truncation, got False")
        if not has_bound:
            raise ValueError("truncated_importance_sampling_ratio must be given for a truncation, got None")
        if truncated_importance_sampling_type != "tis" and truncated_importance_sampling_ratio_min is None:
            raise ValueError(
                "truncated_importance_sampling_ratio_min must be given with truncated_importance_sampling_type="
                f'"{truncated_importance_sampling_type}", got None'
            )
        if truncated_importance_sampling_type == "seq-mask-tis" and sequence_level_importance_ratios:
            raise ValueError('truncated_importance_sampling_type="seq-mask-tis" takes token-level ratios')
    if disable_ppo_ratio and ratio_clip_c is not None:
        raise ValueError(f"ratio_clip_c has no effect with disable_ppo_ratio=True, got {ratio_clip_c!r}")
    options: dict[str, Any] = {
        "loss_type": "reinforce" if disable_ppo_ratio else "cispo" if use_cispo else "dapo",
        "loss_agg_mode": "token-mean" if token_level_loss else "seq-mean-token-mean",
        "temperature": temperature,
        "use_bias_correction_kl": False,
    }
    if use_cispo:
        low = 1 - ratio_clip_min
        options |= {"cispo_ratio_low": low if low > 0 else None, "epsilon_high": 1 + ratio_clip_max}
    elif not disable_ppo_ratio:
        options |= {"epsilon_low": ratio_clip_min, "epsilon_high": ratio_clip_max}
        options |= _dual_clip("ratio_clip_c", ratio_clip_c, ratio_clip_max)
    if sequence_level_importance_ratios and not disable_ppo_ratio:
        options["importance_sampling_level"] = "sequence"
    if reference_policy_kl_penalty != 0 and not use_kl_in_reward:
        options |= {"beta": reference_policy_kl_penalty, "kl_estimator": reference_policy_kl_type}
        options |= {"kl_gradient": "importance_weighted", "kl_clamp": kl_output_clamp_value}
        options["log_ratio_clamp"] = kl_input_clamp_value
    if use_importance_sampling_correction:
        level = "sequence" if sequence_level_importance_ratios else "token"
        kind = _CORRECTIONS.get(truncated_importance_sampling_type or "icepop")  # without bounds it masks nothing
        options["rollout_correction"] = "geometric_mask" if kind is None else f"{level}_{kind}"
        options["rollout_clip_min"] = truncated_importance_sampling_ratio_min
        options["rollout_clip_max"] = truncated_importance_sampling_ratio
    return options


def openrlhf(
    *,
    policy_loss_type: str = "ppo",
    eps_clip_low_high: tuple[float, float] = (0.2, 0.2),
    dual_clip: float | None = None,
    token_level_loss: bool = True,
    use_kl_loss: bool = False,
    init_kl_coef: float = 0.01,
    kl_estimator: str = "k1",
    entropy_loss_coef: float | None = None,
    temperature: float = 1.0,
    enable_vllm_is_correction: bool = False,
    vllm_is_truncated_threshold: tuple[float, float] = (0.5, 5.0),
    vllm_is_correction_type: str = "tis",
) -> dict[str, Any]:
    """OpenRLHF 0.11's ``PolicyLoss`` with its KL penalty and entropy bonus.

    Of OpenRLHF's own: log-ratios are clamped to 20 and estimates of the KL to 10; "gspo" is always the mean over
    sequences, and with ``enable_vllm_is_correction`` its ratio is to the sampler, which is then to be given as
    ``old_logprobs``. Without ``use_kl_loss`` the penalty is in the reward: ``kl_penalized_rewards``.

    Raises:
        ValueError: A type is unknown, or ``dual_clip`` does not lie above the clip range.
    """
    for name, value, known in (
        ("policy_loss_type", policy_loss_type, ("ppo", "gspo")),
        ("vllm_is_correction_type", vllm_is_correction_type, (*_CORRECTIONS, "seq-mask-tis")),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
    is_gspo = policy_loss_type == "gspo"
    low, high = eps_clip_low_high
    options: dict[str, Any] = {
        "loss_type": "dapo",
        "loss_agg_mode": "seq-mean-token-mean" if is_gspo or not token_level_loss else "token-mean",
        "epsilon_low": low,
        "epsilon_high": high,
        "entropy_coef": entropy_loss_coef or 0.0,
        "temperature": temperature,
        "use_bias_correction_kl": False,
    }
    options |= _dual_clip("dual_clip", dual_clip, high)
    if is_gspo:
        options["importance_sampling_level"] = "sequence"
    else:
        options["log_ratio_clamp"] = 20.0
    if use_kl_loss and init_kl_coef != 0:
        options |= {"beta": init_kl_coef, "kl_estimator": kl_estimator, "kl_clamp": 10.0}
    if enable_vllm_is_correction and not is_gspo:
        kind = _CORRECTIONS.get(vllm_is_correction_type)
        options["rollout_correction"] = "geometric_mask" if kind is None else f"token_{kind}"
        options["rollout_clip_min"], options["rollout_clip_max"] = vllm_is_truncated_threshold
    return options


def _dual_clip(name: str, value: float | None, high: float) -> dict[str, Any]:
    """A lower bound of a negative advantage's term, as ``delta``, which it is above the clip range.

    Raises:
        ValueError: It is not above it.
    """
    if value is None:
        return {}
    if not value > 1 + high:
        raise ValueError(f"{name} must be greater than 1 plus the upper clip range, {1 + high}, got {value!r}")
    return {"delta": value}
