"""OpenRLHF's options."""

from __future__ import annotations

from typing import Any

from grpo_kernels.integrations.presets.shared import CORRECTIONS, delta_of_dual_clip
from grpo_kernels.named_arguments import check_keywords


@check_keywords()
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
        ("vllm_is_correction_type", vllm_is_correction_type, (*CORRECTIONS, "seq-mask-tis")),
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
    options |= delta_of_dual_clip("dual_clip", dual_clip, high)
    if is_gspo:
        options["importance_sampling_level"] = "sequence"
    else:
        options["log_ratio_clamp"] = 20.0
    if use_kl_loss and init_kl_coef != 0:
        options |= {"beta": init_kl_coef, "kl_estimator": kl_estimator, "kl_clamp": 10.0}
    if enable_vllm_is_correction and not is_gspo:
        kind = CORRECTIONS.get(vllm_is_correction_type)
        options["rollout_correction"] = "geometric_mask" if kind is None else f"token_{kind}"
        options["rollout_clip_min"], options["rollout_clip_max"] = vllm_is_truncated_threshold
    return options
