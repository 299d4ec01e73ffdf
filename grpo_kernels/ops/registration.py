"""Registration: one schema and one fake per op, one registered op per backend that has kernels for it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from grpo_kernels.backends import BACKENDS

NAMESPACE = "grpo_kernels"
KERNEL_BACKENDS = tuple(backend for backend in BACKENDS if backend != "torch")

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def _without_autocast(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """An op's arguments say what it computes in; autocast must not round its inner GEMMs once more."""

    def run(first: torch.Tensor, *arguments: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return implementation(first, *arguments)

    return run


def lazily(module: str, function: str) -> Callable[..., Any]:
    """A function whose module is imported at the first call, for one that needs what may not be installed.

    It runs on its first argument's device, whatever device is current.
    """

    def run(first: torch.Tensor, *arguments: Any) -> Any:
        with _current(first.device):
            return getattr(importlib.import_module(module), function)(first, *arguments)

    return run


def _current(device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def define(
    name: str,
    schema: str,
    fake: Callable[..., Any],
    implementations: dict[str, Callable[..., Any]] | None = None,
) -> dict[str, Callable[..., Any]]:
    """Defines ``grpo_kernels::<name>_<backend>`` for every backend with kernels.

    Args:
        name: The op's name, without the backend.
        schema: Its arguments and results, in the dispatcher's language.
        fake: Shapes and dtypes of its results, for tracing.
        implementations: Python implementations by backend; a backend that is missing here registers its own,
            from C++, when its extension is loaded.

    Returns:
        The callable of each backend.
    """
    ops = {}
    for backend in KERNEL_BACKENDS:
        qualified = f"{name}_{backend}"
        _LIBRARY.define(qualified + schema)
        torch.library.register_fake(f"{NAMESPACE}::{qualified}", fake, lib=_LIBRARY)
        if implementations and backend in implementations:
            _LIBRARY.impl(qualified, _without_autocast(implementations[backend]), "CompositeExplicitAutograd")
        ops[backend] = getattr(getattr(torch.ops, NAMESPACE), qualified)
    return ops
