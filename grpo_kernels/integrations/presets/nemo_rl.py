"""NeMo-RL's options."""

from __future__ import annotations

from typing import Any

from grpo_kernels.integrations.presets.shared import CORRECTIONS, delta_of_dual_clip
from grpo_kernels.named_arguments import check_keywords


@check_keywords()
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
    kinds = (None, *CORRECTIONS, "seq-mask-tis")
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
        options |= delta_of_dual_clip("ratio_clip_c", ratio_clip_c, ratio_clip_max)
    if sequence_level_importance_ratios and not disable_ppo_ratio:
        options["importance_sampling_level"] = "sequence"
    if reference_policy_kl_penalty != 0 and not use_kl_in_reward:
        options |= {"beta": reference_policy_kl_penalty, "kl_estimator": reference_policy_kl_type}
        options |= {"kl_gradient": "importance_weighted", "kl_clamp": kl_output_clamp_value}
        options["log_ratio_clamp"] = kl_input_clamp_value
    if use_importance_sampling_correction:
        level = "sequence" if sequence_level_importance_ratios else "token"
        kind = CORRECTIONS.get(truncated_importance_sampling_type or "icepop")  # without bounds it masks nothing
        options["rollout_correction"] = "geometric_mask" if kind is None else f"{level}_{kind}"
        options["rollout_clip_min"] = truncated_importance_sampling_ratio_min
        options["rollout_clip_max"] = truncated_importance_sampling_ratio
    return options
