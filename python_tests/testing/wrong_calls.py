"""What a wrong call in a test may name, and how it is checked."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import grpo_kernels
from grpo_kernels import GRPOLossConfig

B, T, V, H = 2, 3, 7, 4
REWARDS = torch.tensor([0.0, 1.0])
#: What a call may name: the package's own names, and inputs that fit.
NAMES: dict[str, Any] = {
    **{name: getattr(grpo_kernels, name) for name in grpo_kernels.__all__},
    **{"torch": torch, "np": np, "inf": math.inf, "B": B, "T": T, "V": V, "H": H},
    "ids": torch.tensor([[0, 1, 2], [3, 4, 6]]),
    "mask": torch.ones(B, T),
    "rewards": REWARDS,
    "advantages": torch.tensor([1.0, -1.0]),
    "logprobs": torch.zeros(B, T),
    "logits": torch.zeros(B, T, V),
    "hidden": torch.zeros(B, T, H),
    "head": torch.zeros(V, H),
    "linear": torch.nn.Linear(H, V),
    "js": GRPOLossConfig(beta=0.1, kl_estimator="js"),
    "PARTS": dict.fromkeys(
        ("chosen_logprobs", "rejected_logprobs", "ref_chosen_logprobs", "ref_rejected_logprobs"), REWARDS
    ),
}


def check_wrong_call(call: str, error: type[Exception], message: str) -> None:
    """A call is refused with this error and this message."""
    with pytest.raises((TypeError, ValueError)) as caught:
        eval(call, dict(NAMES))
    assert type(caught.value) is error and str(caught.value) == message
