"""verl's options."""

from __future__ import annotations

from typing import Any

from grpo_kernels.integrations.presets.shared import delta_of_dual_clip
from grpo_kernels.named_arguments import check_keywords

_VERL_MEANS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
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


@check_keywords()
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
        options |= delta_of_dual_clip("clip_ratio_c", clip_ratio_c, high)
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
