"""TRL's options."""

from __future__ import annotations

from typing import Any

from grpo_kernels.named_arguments import check_keywords

_TRL_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")


@check_keywords()
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
