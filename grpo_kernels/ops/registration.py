"""Registration: one schema and one fake per op, one registered op per backend that has kernels for it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from grpo_kernels.backends import BACKENDS
from grpo_kernels.calls import Call

NAMESPACE = "grpo_kernels"
KERNEL_BACKENDS = tuple(backend for backend in BACKENDS if backend != "torch")

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def _packing(op: Callable[..., Any]) -> Callable[..., Any]:
    """The op with ``Call``s among its arguments."""

    def run(*arguments: Any) -> Any:
        flat: list[Any] = []
        for argument in arguments:
            if isinstance(argument, Call):
                flat.extend(argument.pack())
            else:
                flat.append(argument)
        return op(*flat)

    return run


def _unpacking(function: Callable[..., Any], parts: tuple[type[Call] | None, ...]) -> Callable[..., Any]:
    """The function with its ``Call``s as flat arguments."""

    def run(*arguments: Any) -> Any:
        flat = iter(arguments)
        return function(*(next(flat) if part is None else part.unpack(flat) for part in parts))

    return run


def _without_autocast(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """An op's arguments say what it computes in; autocast must not round its inner GEMMs once more."""

    def run(first: Tensor, *arguments: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return implementation(first, *arguments)

    return run


def lazy_import(module: str, function: str) -> Callable[..., Any]:
    """A function whose module is imported at the first call, for one that needs what may not be installed.

    It runs on its first argument's device, whatever device is current.
    """

    def run(first: Tensor, *arguments: Any) -> Any:
        with _current(first.device):
            return getattr(importlib.import_module(module), function)(first, *arguments)

    return run


def _current(device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def define(
    name: str,
    inputs: Mapping[str, str | type[Call]],
    returns: str,
    fake: Callable[..., Any],
    implementations: Mapping[str, Callable[..., Any]] | None = None,
) -> dict[str, Callable[..., Any]]:
    """Defines ``grpo_kernels::<name>_<backend>`` for every backend with kernels.

    Args:
        name: The op's name, without the backend.
        inputs: Its arguments in their order, the first a tensor: each a type in the dispatcher's language, or a class
            of calls.
        returns: Its results, in the dispatcher's language.
        fake: Takes the inputs; gives results of the right shapes and dtypes, for tracing.
        implementations: By backend, functions that take the inputs; a backend that is missing here registers its own,
            from C++, when its extension is loaded.

    Returns:
        The callable of each backend, which takes the inputs.
    """
    schema = ", ".join(
        f"{kind} {argument}" if isinstance(kind, str) else kind.schema() for argument, kind in inputs.items()
    )
    parts = tuple(None if isinstance(kind, str) else kind for kind in inputs.values())
    has_calls = any(part is not None for part in parts)
    ops = {}
    for backend in KERNEL_BACKENDS:
        qualified = f"{name}_{backend}"
        _LIBRARY.define(f"{qualified}({schema}) -> {returns}")
        torch.library.register_fake(f"{NAMESPACE}::{qualified}", _unpacking(fake, parts), lib=_LIBRARY)
        if implementations and backend in implementations:
            implementation = _without_autocast(implementations[backend])
            _LIBRARY.impl(qualified, _unpacking(implementation, parts), "CompositeExplicitAutograd")
        op = getattr(getattr(torch.ops, NAMESPACE), qualified)
        ops[backend] = _packing(op) if has_calls else op
    return ops
