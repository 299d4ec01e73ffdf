"""Where a number counts as infinite, and what stands for it there. `csrc/policy_math.h` has the same numbers.

The limit is taken before the exponential, in finite numbers: 0 times a ratio is 0, and terms add without ``inf - inf``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

#: Of log-ratios, either way: closer to 0 than this, nothing is compared with a limit.
NEAR = 40.0
#: Of a log-probability from another, or from 0.
DISTANCE = 1e15
_LOG_RATIOS = {torch.float32: 80.0, torch.float64: 700.0}


def largest_log_ratio(dtype: torch.dtype) -> float:
    """The argument of an exponential: past it a ratio counts as infinite."""
    return _LOG_RATIOS[dtype]


def largest_joint(dtype: torch.dtype) -> float:
    """Of the log-ratio less the one to the reference: past what the ratio alone comes to."""
    return _LOG_RATIOS[dtype] + 5


def largest_term(dtype: torch.dtype) -> float:
    """Of a KL estimate times a ratio."""
    return torch.finfo(dtype).max / 32


def limited(values: Tensor, low: float = -math.inf, high: float = math.inf) -> Tensor:
    """The values within these limits, with the gradient of the values."""
    function = _Limited if torch.compiler.is_compiling() else _LimitedWithJvp  # Dynamo refuses the latter
    limits: Tensor = function.apply(values, low, high)
    return limits


class _Limited(torch.autograd.Function):
    @staticmethod
    def forward(values: Tensor, low: float, high: float) -> Tensor:  # type: ignore[override]
        return values.clamp(low, high)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, dvalues: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return dvalues, None, None


class _LimitedWithJvp(_Limited):
    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, dvalues: Tensor, *_: None) -> Tensor:  # type: ignore[override]
        return dvalues.clone()


def is_eager(values: Tensor) -> bool:
    """Whether a value may be read at once: on a CPU, outside of tracing and of torch.func's transforms."""
    is_traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return values.device.type == "cpu" and not is_traced


@torch.no_grad()
def are_near(values: Tensor, bound: float = NEAR) -> bool:
    """Whether all of these are within the bound, as far as that is known. NaN is not."""
    if not is_eager(values):
        return False
    if not values.numel():
        return True
    low, high = values.aminmax()
    return -bound <= low.item() and high.item() <= bound
