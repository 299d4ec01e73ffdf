"""AdamW as transformers' Trainer sets it up."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

from grpo_kernels.training.recipe import Recipe

#: Names that weight decay passes by, those of transformers' ``Trainer.get_decay_parameter_names``.
NOT_DECAYED = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")


def build_optimizer(model: Any, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW of the trained parameters in one kernel; biases and the weights of norms do not decay."""
    decayed = set(get_parameter_names(model, [nn.LayerNorm], NOT_DECAYED))
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for name, parameter in trained if name in decayed], "weight_decay": recipe.weight_decay},
        {"params": [parameter for name, parameter in trained if name not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=recipe.learning_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
        fused=True,
    )
