"""Gradients in memory that is not theirs alone: formed by the forward, or written over the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_kernels.ops.library import define, lazily

#: ``gradient *= factor`` by a kernel that reads the scalar where it lies and stops at 1.
_SCALE = define(
    "scale",
    "(Tensor(a!) gradient, Tensor factor) -> ()",
    lambda gradient, factor: None,
    {"triton": lazily("grpo_kernels.ops.triton_scale", "scale")},
)


def hand_over(
    ctx: Any, factor: Tensor, backend: str, gradients: Sequence[Tensor | None] | None = None
) -> tuple[Tensor | None, ...]:
    """The gradients that a forward saved, times the upstream scalar, in their own memory: all, or those given."""
    refuse_second_backward(ctx)
    gradients = ctx.saved_tensors if gradients is None else tuple(gradients)
    for gradient in gradients:
        if gradient is not None:
            _SCALE[backend](gradient, factor.to(gradient.device))
    return gradients


def refuse_second_backward(ctx: Any) -> None:
    """Refuses a backward after the first: whoever received the gradient may have changed it.

    A traced graph needs no such care: it sees every write in the ops' schemas.

    Raises:
        RuntimeError: This node's backward has run before.
    """
    if torch.compiler.is_compiling():
        return
    if getattr(ctx, "handed_over", False):
        raise RuntimeError(
            "a second backward is refused: the first handed over the gradient that the forward formed, or wrote it "
            "over the logits; call the loss again"
        )
    ctx.handed_over = True


def refuse_double_backward() -> None:
    """Refuses a backward that is itself to be differentiated: kernels' gradients carry no graph.

    Raises:
        RuntimeError: The backward runs with ``create_graph=True``.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("kernels differentiate once: create_graph=True is refused; backend='torch' serves it")


def mark_written(tensor: Tensor) -> None:
    """Tells autograd that a kernel wrote into ``tensor``, so that saved uses of its old values are refused."""
    if not torch.compiler.is_compiling():  # a traced graph sees the write in the op's schema
        torch.autograd.graph.increment_version(tensor)
