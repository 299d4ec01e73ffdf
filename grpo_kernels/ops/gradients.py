"""What every backward returns, and what it refuses."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor


def named_gradients(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Lets the backward of an autograd function return the gradients that it has, by the names of its inputs."""
    names = tuple(inspect.signature(function.forward).parameters)[1:]  # without the context
    backward = function.backward

    def by_position(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = backward(ctx, *upstream)
        return tuple([gradients.get(name) for name in names])

    function.backward = staticmethod(by_position)  # type: ignore[assignment]
    return function


def has_run_backward(ctx: Any) -> bool:
    """Whether a backward that ``refuse_second_backward`` saw has run before."""
    return getattr(ctx, "has_run_backward", False)


def refuse_second_backward(ctx: Any) -> None:
    """Refuses a backward after the first: whoever received the gradient may have changed it.

    A traced graph needs no such care: it sees every write in the ops' schemas.

    Raises:
        RuntimeError: This node's backward has run before.
    """
    if torch.compiler.is_compiling():
        return
    if has_run_backward(ctx):
        raise RuntimeError(
            "a second backward is refused: the first handed over the gradient that the forward formed, or wrote it "
            "over the logits; call the loss again"
        )
    ctx.has_run_backward = True


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
