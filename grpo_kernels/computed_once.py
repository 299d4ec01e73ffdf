"""Properties of frozen dataclasses that are computed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class computed_once(Generic[Value]):
    """A property of a frozen dataclass that is computed once.

    The ``functools.cached_property`` of Python 3.11 takes a lock, which torch.compile cannot trace.
    """

    def __init__(self, function: Callable[[Any], Value]) -> None:
        self.function, self.__doc__ = function, function.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Value:
        if instance is None:
            return self  # type: ignore[return-value]
        value = self.function(instance)
        object.__setattr__(instance, self.name, value)
        return value
