"""The bounds beyond which a number counts as infinite; mirrored in csrc/policy_math.h.

Arguments of an exponential are clamped to them, so that ratios stay finite: 0 times a ratio is then 0, and no sum is
``inf - inf``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

#: Bound of log-ratios on either side. Within it nothing needs to be compared with a limit.
NEAR = 40.0
#: The difference of two log-probabilities, or a log-probability itself, counts as infinite beyond this.
DISTANCE = 1e15
_LOG_RATIOS = {torch.float32: 80.0, torch.float64: 700.0}


def largest_log_ratio(dtype: torch.dtype) -> float:
    """A ratio counts as infinite if its logarithm is above this."""
    return _LOG_RATIOS[dtype]


def largest_joint(dtype: torch.dtype) -> float:
    """Bound of the log-ratio minus the log-ratio to the reference. It is above ``largest_log_ratio``."""
    return _LOG_RATIOS[dtype] + 5


def largest_term(dtype: torch.dtype) -> float:
    """Bound of a KL estimate times a ratio."""
    return torch.finfo(dtype).max / 32


def straight_through_clamp(values: Tensor, low: float = -math.inf, high: float = math.inf) -> Tensor:
    """``values.clamp(low, high)``, with a gradient of 1 outside of the bounds too."""
    is_compiling = torch.compiler.is_compiling()  # Dynamo refuses a jvp
    function = _StraightThroughClamp if is_compiling else _StraightThroughClampWithJvp
    clamped: Tensor = function.apply(values, low, high)
    return clamped


class _StraightThroughClamp(torch.autograd.Function):
    @staticmethod
    def forward(values: Tensor, low: float, high: float) -> Tensor:  # type: ignore[override]
        return values.clamp(low, high)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, dvalues: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return dvalues, None, None


class _StraightThroughClampWithJvp(_StraightThroughClamp):
    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, dvalues: Tensor, *_: None) -> Tensor:  # type: ignore[override]
        return dvalues.clone()


def is_eager(values: Tensor) -> bool:
    """Whether a value can be read without a sync: on a CPU, and not during tracing or torch.func's transforms."""
    is_traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return values.device.type == "cpu" and not is_traced


@torch.no_grad()
def all_within(values: Tensor, bound: float = NEAR) -> bool:
    """Whether all values are known to be within the bound on either side. NaN is not; nor is what cannot be read."""
    if not is_eager(values):
        return False
    if not values.numel():
        return True
    low, high = values.aminmax()
    return -bound <= low.item() and high.item() <= bound
