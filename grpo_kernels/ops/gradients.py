"""Gradients that a forward has already formed: scaled in the backward, handed over once."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels.ops.library import define

#: ``gradient *= factor`` by a kernel that reads the scalar where it lies and stops at 1.
_SCALE = define("scale", "(Tensor(a!) gradient, Tensor factor) -> ()", lambda gradient, factor: None)


def hand_over(gradient: Tensor, factor: Tensor, backend: str) -> Tensor:
    """The saved gradient times the upstream scalar, in its own memory.

    Whoever receives it may change it, so saving it again for a second backward would be wrong: it counts as written,
    and autograd refuses to unpack it twice.
    """
    _SCALE[backend](gradient, factor.to(gradient.device))
    mark_written(gradient)
    return gradient


def mark_written(tensor: Tensor) -> None:
    """Tells autograd that a kernel wrote into ``tensor``, so that saved uses of its old values are refused."""
    if not torch.compiler.is_compiling():  # a traced graph sees the write in the op's schema
        torch.autograd.graph.increment_version(tensor)
