"""Other frameworks' options, by their names and with their defaults, as those of ``GRPOLossConfig``.

A name is that of the framework's own configuration, and an option that the framework has and ours does not is a
``TypeError``, as for any function. Each preset says which release it follows.
"""

from __future__ import annotations

from grpo_kernels.integrations.presets.nemo_rl import nemo_rl
from grpo_kernels.integrations.presets.openrlhf import openrlhf
from grpo_kernels.integrations.presets.trl import trl
from grpo_kernels.integrations.presets.verl import verl
from grpo_kernels.loss.config import PRESETS

__all__ = ["nemo_rl", "openrlhf", "trl", "verl"]

PRESETS.update(nemo_rl=nemo_rl, openrlhf=openrlhf, trl=trl, verl=verl)
