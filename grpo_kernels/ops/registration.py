"""Registration of ops: one schema and one fake per op, one registered op per backend with kernels."""

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


def _pack_calls(op: Callable[..., Any]) -> Callable[..., Any]:
    """Makes an op with flat arguments accept ``Call``s."""

    def run(*arguments: Any) -> Any:
        flat: list[Any] = []
        for argument in arguments:
            if isinstance(argument, Call):
                flat.extend(argument.pack())
            else:
                flat.append(argument)
        return op(*flat)

    return run


def _unpack_calls(function: Callable[..., Any], call_types: tuple[type[Call] | None, ...]) -> Callable[..., Any]:
    """Makes a function with ``Call``s accept flat arguments."""

    def run(*arguments: Any) -> Any:
        flat = iter(arguments)
        return function(*(next(flat) if kind is None else kind.unpack(flat) for kind in call_types))

    return run


def _without_autocast(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Switches autocast off in an op: its arguments give the dtypes, and autocast would round its GEMMs again."""

    def run(first: Tensor, *arguments: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return implementation(first, *arguments)

    return run


def lazy_import(module: str, function: str) -> Callable[..., Any]:
    """A function whose module is imported at the first call, because its dependencies may not be installed.

    It runs on the device of its first argument, whatever device is current.
    """

    def run(first: Tensor, *arguments: Any) -> Any:
        with _device_context(first.device):
            return getattr(importlib.import_module(module), function)(first, *arguments)

    return run


def _device_context(device: torch.device) -> AbstractContextManager[Any]:
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
        inputs: Its arguments in order, each a schema type or a subclass of ``Call``. The first is a tensor.
        returns: The schema of its results.
        fake: Takes the inputs; returns results of the right shapes and dtypes, for tracing.
        implementations: Functions of the inputs, by backend. A backend that is missing here registers its own from C++,
            when its extension is loaded.

    Returns:
        A function of the inputs for each backend.
    """
    schema = ", ".join(
        f"{kind} {argument}" if isinstance(kind, str) else kind.schema() for argument, kind in inputs.items()
    )
    call_types = tuple(None if isinstance(kind, str) else kind for kind in inputs.values())
    has_calls = any(kind is not None for kind in call_types)
    ops = {}
    for backend in KERNEL_BACKENDS:
        qualified = f"{name}_{backend}"
        _LIBRARY.define(f"{qualified}({schema}) -> {returns}")
        torch.library.register_fake(f"{NAMESPACE}::{qualified}", _unpack_calls(fake, call_types), lib=_LIBRARY)
        if implementations and backend in implementations:
            implementation = _without_autocast(implementations[backend])
            _LIBRARY.impl(qualified, _unpack_calls(implementation, call_types), "CompositeExplicitAutograd")
        op = getattr(getattr(torch.ops, NAMESPACE), qualified)
        ops[backend] = _pack_calls(op) if has_calls else op
    return ops
