"""What TRL's GRPO trainer is about to ask of its log-probabilities, in this package's terms.

Nothing here is part of a loss: TRL's own ``_compute_loss`` computes it, and its gradient is compared with what this
says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from grpo_kernels.loss.config import GRPOLossConfig
from grpo_kernels.loss.inputs import PolicyInputs
from grpo_kernels.ops.head.speculation import ExpectedLoss

_OF_NUM_ITEMS = ("dapo", "cispo")  # whose divisor is the generation batch's


def config_of(trainer: Any) -> GRPOLossConfig:
    """The loss of a ``GRPOTrainer``, with the coefficient that its entropy bonus has now."""
    args = trainer.args
    coefficient = 0.0
    if trainer._entropy_bonus_enabled:
        is_on = not trainer.use_adaptive_entropy or trainer._last_world_entropy <= args.entropy_target
        coefficient = float(trainer.entropy_coef) if is_on else 0.0
    return GRPOLossConfig.trl(
        loss_type=trainer.loss_type,
        importance_sampling_level=trainer.importance_sampling_level,
        epsilon=trainer.epsilon_low,
        epsilon_high=trainer.epsilon_high,
        delta=args.delta,
        beta=trainer.beta,
        use_bias_correction_kl=args.use_bias_correction_kl,
        temperature=trainer.temperature,
        entropy_coef=coefficient,
        top_entropy_quantile=trainer.top_entropy_quantile,
        off_policy_mask_threshold=trainer.off_policy_mask_threshold,
        sapo_temperature_pos=args.sapo_temperature_pos,
        sapo_temperature_neg=args.sapo_temperature_neg,
        vespo_k_pos=args.vespo_k_pos,
        vespo_lambda_pos=args.vespo_lambda_pos,
        vespo_k_neg=args.vespo_k_neg,
        vespo_lambda_neg=args.vespo_lambda_neg,
        max_completion_length=trainer.max_completion_length,
    )


def scored_tokens(inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Which completion tokens the loss reads ``[B, T]``, and which of the flattened ones TRL's head is asked for."""
    attended = inputs["completion_mask"] != 0
    mask = attended & (inputs["tool_mask"] != 0) if "tool_mask" in inputs else attended
    return mask, attended.flatten().nonzero()[:, 0]


def fill_of(inputs: Mapping[str, Any], rows: Tensor) -> Tensor | None:
    """What stands for the log-probabilities of tokens that the loss does not read: what it compares them with."""
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        if inputs.get(name) is not None:
            return inputs[name].flatten()[rows].detach()
    return None


def expected_loss(trainer: Any, inputs: Mapping[str, Any], mask: Tensor, rows: Tensor) -> ExpectedLoss | None:
    """The loss that ``_compute_loss`` takes of these inputs; None where a token's gradient waits for others.

    Args:
        trainer: TRL's, or one that has its ``_compute_loss``.
        inputs: What ``compute_loss`` is given.
        mask, rows: As ``scored_tokens`` gives them.
    """
    config = config_of(trainer)
    if config.weights_need_logprobs:
        return None
    accumulated, num_items = 1.0, None
    if trainer.model.training:
        accumulated = float(trainer.current_gradient_accumulation_steps)
    if config.loss_type in _OF_NUM_ITEMS:
        num_items = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
        if trainer.model.training:
            num_items = num_items / trainer.args.steps_per_generation
    rollout = None
    if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
        rollout = inputs["importance_sampling_ratio"]
    advantages = inputs["advantages"]
    policy = PolicyInputs.of(
        inputs["completion_ids"],
        torch.float32,
        advantages[:, 0] if advantages.shape == (advantages.shape[0], 1) else advantages,
        mask,
        old_logprobs=inputs.get("old_per_token_logps"),
        ref_logprobs=inputs.get("ref_per_token_logps"),
        rollout_is_weights=rollout,
        num_items_in_batch=num_items,
        cu_seqlens=None,
        loss_scale=1 / accumulated,
        config=config,
        debug=False,
    )
    return ExpectedLoss.of(policy, config, rows)
