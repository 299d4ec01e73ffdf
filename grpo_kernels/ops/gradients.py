"""Helpers of every backward: gradients by name, and the refusal of backwards that kernels cannot do."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor


def named_gradients(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Lets a backward return a dict from names of the forward's inputs to gradients; missing ones are None."""
    names = tuple(inspect.signature(function.forward).parameters)[1:]  # without the context
    known = frozenset(names)
    backward = function.backward

    def by_position(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = backward(ctx, *upstream)
        if not gradients.keys() <= known:
            raise KeyError(f"gradients of unknown inputs: {sorted(gradients.keys() - known)}")
        return tuple([gradients.get(name) for name in names])

    function.backward = staticmethod(by_position)  # type: ignore[assignment]
    return function


def has_run_backward(ctx: Any) -> bool:
    """Whether ``mark_backward_run`` has been called for this node."""
    return getattr(ctx, "has_run_backward", False)


def mark_backward_run(ctx: Any) -> None:
    """Notes that what this node saved has been given away or overwritten."""
    ctx.has_run_backward = True


def refuse_second_backward(ctx: Any) -> None:
    """Refuses a second backward: the receiver of the first gradient may have changed its memory.

    Not needed in a traced graph, which sees every write in the ops' schemas.

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
    mark_backward_run(ctx)


def refuse_double_backward() -> None:
    """Refuses a differentiable backward: gradients from kernels carry no graph.

    Raises:
        RuntimeError: The backward runs with ``create_graph=True``.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("kernels differentiate once: create_graph=True is refused; backend='torch' serves it")


def mark_written(tensor: Tensor) -> None:
    """Tells autograd that a kernel wrote to ``tensor``, so that backwards that saved its old values raise."""
    if not torch.compiler.is_compiling():  # a traced graph sees the write in the op's schema
        torch.autograd.graph.increment_version(tensor)
