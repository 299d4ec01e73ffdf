"""Other frameworks' options as those of ``GRPOLossConfig``: the functions of ``integrations.presets``."""

from __future__ import annotations

from grpo_kernels.integrations.presets import nemo_rl, openrlhf, trl, verl

__all__ = ["nemo_rl", "openrlhf", "trl", "verl"]
