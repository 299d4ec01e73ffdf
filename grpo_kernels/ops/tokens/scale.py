"""Gradients that a forward saved, times the upstream scalar."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from grpo_kernels.ops.gradients import refuse_double_backward, refuse_second_backward
from grpo_kernels.ops.registration import define, lazy_import

#: ``gradient *= factor``, by a kernel that reads the factor on the device and does nothing if it is 1.
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
    """The saved gradients, or the given ones, multiplied in place by the upstream scalar."""
    refuse_second_backward(ctx)
    gradients = ctx.saved_tensors if gradients is None else tuple(gradients)
    for gradient in gradients:
        if gradient is not None:
            _SCALE[backend](gradient, factor.to(gradient.device))
    return gradients


def backward_of(*names: str) -> Callable[..., dict[str, Tensor | None]]:
    """The backward of a loss whose forward saved, in this order, its gradients by these inputs, and its ``backend``."""

    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> dict[str, Tensor | None]:
        refuse_double_backward()
        if dloss is None:
            return {}
        return dict(zip(names, scale_gradients(ctx, dloss, ctx.backend), strict=True))

    return backward
