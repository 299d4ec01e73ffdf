"""Configurations by hypothesis: every option that a loss type has, none that it refuses; and what rounding decides."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from testing.inputs import Inputs
from torch import Tensor

from grpo_kernels import GRPOLossConfig
from grpo_kernels.loss.aggregation import CLIPPED_LOSSES
from grpo_kernels.loss.options import (
    DIVERGENCES,
    KL_ESTIMATORS,
    KL_GRADIENTS,
    LOSS_AGG_MODES,
    LOSS_TYPES,
)
from grpo_kernels.loss.sequences import Sequences

TRL_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
_WITHOUT_LEVEL = ("vespo", "gmpo", "reinforce", "clip_cov", "kl_cov")


@st.composite
def configs(draw: st.DrawFn, loss_types: tuple[str, ...] = LOSS_TYPES, only_trls: bool = False) -> GRPOLossConfig:
    """A configuration; with ``only_trls`` of options that TRL has."""

    def one_of(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    loss_type = one_of(*loss_types)
    options: dict[str, Any] = {"loss_type": loss_type, "max_completion_length": 8, "beta": one_of(0.0, 0.1)}
    if loss_type == "kl_cov":
        options |= {"beta": 0.0, "kl_cov_ratio": one_of(0.2, 0.5)}
    if loss_type == "clip_cov":  # all that may be drawn are
        options |= {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.05}
    if not only_trls and loss_type != "gmpo":
        options["loss_agg_mode"] = one_of(None, None, *LOSS_AGG_MODES)
    options |= {"temperature": one_of(1.0, 0.7, 1.5), "entropy_coef": one_of(0.0, 0.05)}
    options |= {"use_bias_correction_kl": one_of(True, False)}
    if loss_type not in _WITHOUT_LEVEL:
        levels = ("token", "sequence") if only_trls else ("token", "sequence", "sequence_token")
        options["importance_sampling_level"] = one_of(*levels)
    if loss_type in (*CLIPPED_LOSSES, "gmpo"):
        options["epsilon_high"] = one_of(None, 0.28)
    if loss_type in CLIPPED_LOSSES:
        options["delta"] = one_of(None, 1.6)
    if loss_type == "cispo":
        options["epsilon_high"] = one_of(1.3, 5.0)
        options["cispo_ratio_low"] = None if only_trls else one_of(None, 0.8)
    if loss_type == "sapo":
        options |= {"sapo_temperature_pos": one_of(1.0, 1.5), "sapo_temperature_neg": one_of(1.0625, 2.0)}
    if loss_type == "vespo":
        options |= {"vespo_k_pos": one_of(2.0, 1.5), "vespo_lambda_neg": one_of(2.0, 1.0)}
    is_whole = loss_type != "gmpo" and not (options.get("loss_agg_mode") and options["entropy_coef"])
    if is_whole:
        options["top_entropy_quantile"] = one_of(1.0, 1.0, 0.37)
    options["off_policy_mask_threshold"] = one_of(None, None, 0.0173)
    if options["beta"] and not only_trls:
        options["kl_estimator"] = one_of(*KL_ESTIMATORS, *DIVERGENCES)
        is_exact = options["kl_estimator"] in DIVERGENCES
        if not is_exact:
            options["kl_clamp"] = one_of(None, 0.031)
        if not is_exact and not options["use_bias_correction_kl"]:
            options["kl_gradient"] = one_of(*KL_GRADIENTS)
    if options.get("importance_sampling_level") == "token" and not only_trls:
        options["log_ratio_clamp"] = one_of(None, 0.213)
    return GRPOLossConfig(**options)


def are_top_covariances_settled(inputs: Inputs, logprobs: Tensor, error: float) -> bool:
    """Whether "kl_cov" penalises the same tokens in fp32 and in fp64; two tokens' covariances are always equal.

    A covariance is a product of two centred numbers, each off by what it is computed from and by the sum of its mean.

    Args:
        inputs: A case's.
        logprobs: In fp64.
        error: How far those of an implementation may be from them.
    """
    config, mask = inputs.case.config, inputs.mask != 0
    count = int(mask.sum())
    if config.loss_type != "kl_cov" or count < 2:
        return True
    advantages = Sequences.of(mask, inputs.cu_seqlens).per_token(inputs.advantages.double())[mask]
    of_tokens = logprobs.double()[mask]
    a, b = advantages - advantages.mean(), of_tokens - of_tokens.mean()
    rounding = (count + 1) * torch.finfo(torch.float32).eps
    off_a, off_b = rounding * advantages.abs().max(), rounding * of_tokens.abs().max() + 2 * error
    off = a.abs().max() * off_b + b.abs().max() * off_a + off_a * off_b
    covariances = (a * b).sort(descending=True).values
    chosen = max(1, int(count * config.kl_cov_ratio))
    return bool(covariances[chosen - 1] - covariances[chosen] > 2 * off)
