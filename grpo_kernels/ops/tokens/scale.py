"""Gradients that a forward saved, times the upstream scalar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from grpo_kernels.ops.gradients import refuse_second_backward
from grpo_kernels.ops.registration import define, lazy_import

#: ``gradient *= factor`` by a kernel that reads the scalar where it lies and stops at 1.
_SCALE = define(
    "scale",
    {"gradient": "Tensor(a!)", "factor": "Tensor"},
    "()",
    lambda gradient, factor: None,
    {"triton": lazy_import("grpo_kernels.ops.tokens.triton.scale", "scale")},
)


def scale_gradients(
    ctx: Any, factor: Tensor, backend: str, gradients: Sequence[Tensor | None] | None = None
) -> tuple[Tensor | None, ...]:
    """The gradients that a forward saved, times the upstream scalar, in their own memory: all, or those given."""
    refuse_second_backward(ctx)
    gradients = ctx.saved_tensors if gradients is None else tuple(gradients)
    for gradient in gradients:
        if gradient is not None:
            _SCALE[backend](gradient, factor.to(gradient.device))
    return gradients
