"""One token at a time through the fp64 reference: the values that ``csrc/tests/test_policy_math.cpp`` is held to.

``python python_tests/policy_math_cases.py`` writes them anew, to be read as a change of what the loss is.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import torch

from grpo_kernels import GRPOLossConfig
from grpo_kernels.loss.inputs import PolicyInputs
from grpo_kernels.loss.metrics import Partial
from grpo_kernels.loss.reference import policy_loss

FILE = Path(__file__).parents[1] / "csrc" / "tests" / "policy_math_cases.txt"
CONFIGS = {
    "clip": GRPOLossConfig(),
    "clip_delta": GRPOLossConfig(delta=1.5, epsilon_high=0.3, beta=0.1, use_bias_correction_kl=False),
    "k3_corrected": GRPOLossConfig(beta=0.1),
    "k1": GRPOLossConfig(beta=0.1, kl_estimator="k1", use_bias_correction_kl=False),
    "k2": GRPOLossConfig(beta=0.1, kl_estimator="k2"),
    "abs_clamped": GRPOLossConfig(beta=0.1, kl_estimator="abs", kl_clamp=0.4, log_ratio_clamp=1.0),
    "k3_clamped": GRPOLossConfig(beta=0.1, kl_clamp=0.4, log_ratio_clamp=1.0, use_bias_correction_kl=False),
    "straight_through": GRPOLossConfig(beta=0.1, kl_gradient="straight_through", use_bias_correction_kl=False),
    "importance_weighted": GRPOLossConfig(beta=0.1, kl_gradient="importance_weighted", use_bias_correction_kl=False),
    "cispo": GRPOLossConfig(loss_type="cispo", epsilon_high=2.0, beta=0.1),
    "sapo": GRPOLossConfig(loss_type="sapo", beta=0.1),
    "surrogate": GRPOLossConfig(loss_type="surrogate"),
    "reinforce": GRPOLossConfig(loss_type="reinforce", beta=0.1),
    "sequence": GRPOLossConfig(importance_sampling_level="sequence", beta=0.1),
    "gmpo": GRPOLossConfig(loss_type="gmpo", beta=0.1, use_bias_correction_kl=False),
}
LOG_RATIOS = (0.0, 0.1, -0.3, 0.31, -1.7, 2.2)  # none of them near a bound
ADVANTAGES = (1.25, -0.75)
TOKENS = ((-0.015, 0.04), (-7.7, -0.6), (-1.3, 1.9))  # l, and l - l_ref


def _fp32(value: float) -> float:
    """The fp32 number next to it: what fp32 and fp64 are given is the same."""
    return torch.tensor(value, dtype=torch.float32).item()


def _line(config: GRPOLossConfig, logprob: float, difference: float, log_ratio: float, advantage: float) -> str:
    """A token's inputs and what the reference makes of them."""
    logprob, old = _fp32(logprob), _fp32(logprob - log_ratio)
    ref = _fp32(logprob - difference) if config.beta else math.nan
    leaf = torch.tensor([[logprob]], dtype=torch.float64, requires_grad=True)
    inputs = PolicyInputs.of(
        torch.zeros(1, 1, dtype=torch.int64),
        torch.float64,
        torch.tensor([advantage], dtype=torch.float64),
        torch.ones(1, 1),
        old_logprobs=torch.tensor([[old]], dtype=torch.float64),
        ref_logprobs=torch.tensor([[ref]], dtype=torch.float64) if config.beta else None,
        num_items_in_batch=4,
        cu_seqlens=None,
        loss_scale=1.0,
        config=config,
        debug=False,
    )
    loss, partials = policy_loss(leaf, inputs, None, config)
    loss.backward()
    weights = inputs.weights.item(), inputs.weights.item()
    found = [partials[at].item() for at in (Partial.KL, Partial.LOW, Partial.HIGH)]
    values = [logprob, old, ref, advantage, *weights, loss.item(), leaf.grad.item(), *found]
    return " ".join(["token", *map(repr, values)])


def text() -> str:
    """The whole file: a line for each config, its tokens below it."""
    lines = []
    for name, config in CONFIGS.items():
        code = config.code()
        lines.append(" ".join([name, *map(str, code.options), *map(repr, code.params)]))
        for token, log_ratio, advantage in itertools.product(TOKENS, LOG_RATIOS, ADVANTAGES):
            lines.append(_line(config, *token, log_ratio, advantage))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
