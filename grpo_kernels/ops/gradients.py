"""Gradients in memory that is not theirs alone: formed by the forward, or written over the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
