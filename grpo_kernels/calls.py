"""Named arguments of registered ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Self, get_type_hints

import torch
from torch import Tensor

#: The dispatcher's name of a type.
_DISPATCHER_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "int",
    int | None: "int?",
    float: "float",
    torch.dtype: "ScalarType",
    list[int]: "int[]",
    list[float]: "float[]",
}


class Call:
    """Named arguments of a registered op; a subclass is a frozen dataclass.

    The dispatcher only takes flat arguments. These are the fields in order; a field that is itself a ``Call`` is
    replaced by its own fields. ``schema`` also generates the functions that flatten, rebuild and map a call, as a
    dataclass generates its methods: a loop over the fields would take longer than a small kernel.
    """

    _hints: ClassVar[dict[str, Any]]  # by field: its type
    _flatten: ClassVar[Callable[[Any], tuple[Any, ...]]]
    _rebuild: ClassVar[Callable[[Iterator[Any]], Any]]
    _apply: ClassVar[Callable[[Any, Callable[[Tensor], Tensor]], Any]]

    @classmethod
    def schema(cls, prefix: str = "") -> str:
        """The schema of the fields, with ``prefix`` before their names."""
        cls._hints = {name: hint for name, hint in get_type_hints(cls).items() if name in cls.__dataclass_fields__}
        schema = ", ".join(
            hint.schema(f"{prefix}{name}_") if is_call(hint) else f"{_DISPATCHER_TYPES[hint]} {prefix}{name}"
            for name, hint in cls._hints.items()
        )
        classes = {each.__name__: each for each in cls._classes()}
        rebuilt = cls._source(lambda field, hint: None if is_call(hint) else "next(values)")
        cls._flatten = eval(f"lambda call: ({''.join(f'{path}, ' for path in cls._paths())})")
        cls._rebuild = eval(f"lambda values: {rebuilt}", classes)
        cls._apply = eval(f"lambda call, function: {cls._source(_mapped)}", classes)
        return schema

    def pack(self) -> tuple[Any, ...]:
        """The flat arguments."""
        return type(self)._flatten(self)

    @classmethod
    def unpack(cls, arguments: Iterator[Any]) -> Self:
        """Makes a call from the next flat arguments."""
        return cls._rebuild(arguments)

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """A copy with the function applied to every tensor."""
        return type(self)._apply(self, function)

    @classmethod
    def holds_tensors(cls) -> bool:
        return any(hint.holds_tensors() if is_call(hint) else hint in _TENSORS for hint in cls._hints.values())

    @classmethod
    def _classes(cls) -> Iterator[type[Call]]:
        """This class and those of its fields."""
        yield cls
        for hint in cls._hints.values():
            if is_call(hint):
                yield from hint._classes()

    @classmethod
    def _paths(cls, path: str = "call") -> Iterator[str]:
        """Source of each flat argument."""
        for name, hint in cls._hints.items():
            yield from hint._paths(f"{path}.{name}") if is_call(hint) else (f"{path}.{name}",)

    @classmethod
    def _source(cls, leaf: Callable[[str, Any], str | None], path: str = "call") -> str:
        """Source that makes a call. ``leaf`` gives that of a field by its path and type, or None to make it in turn."""
        fields = ((f"{path}.{name}", hint) for name, hint in cls._hints.items())
        return f"{cls.__name__}({', '.join(leaf(field, hint) or hint._source(leaf, field) for field, hint in fields)})"


_TENSORS = (Tensor, Tensor | None)


def _mapped(field: str, hint: Any) -> str | None:
    """Source of a field in ``Call.map``."""
    if is_call(hint):
        return None if hint.holds_tensors() else field
    if hint in _TENSORS:
        return f"function({field})" if hint is Tensor else f"None if {field} is None else function({field})"
    return field


def is_call(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Call)
