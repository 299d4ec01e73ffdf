"""Arguments of registered ops by their names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Self, get_type_hints

import torch
from torch import Tensor

#: What the dispatcher calls a type.
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
    """Arguments of registered ops by their names.

    A subclass is a frozen dataclass. The dispatcher knows flat lists of arguments alone: its fields are these in their
    order, and those of a field that is itself a ``Call`` stand in that field's place.
    """

    _parts: ClassVar[dict[str, type[Call] | None]]  # by field: its class where it is a ``Call``

    @classmethod
    def schema(cls, prefix: str = "") -> str:
        """The fields in the dispatcher's language, their names after ``prefix``."""
        hints = {name: hint for name, hint in get_type_hints(cls).items() if name in cls.__dataclass_fields__}
        cls._parts = {name: hint if is_call(hint) else None for name, hint in hints.items()}
        return ", ".join(
            hint.schema(f"{name}_") if is_call(hint) else f"{_DISPATCHER_TYPES[hint]} {prefix}{name}"
            for name, hint in hints.items()
        )

    def pack(self) -> list[Any]:
        """The flat arguments."""
        arguments: list[Any] = []
        for name, part in self._parts.items():
            if part is None:
                arguments.append(getattr(self, name))
            else:
                arguments.extend(getattr(self, name).pack())
        return arguments

    @classmethod
    def unpack(cls, arguments: Iterator[Any]) -> Self:
        """The call that these flat arguments are the next ones of."""
        return cls(*(next(arguments) if part is None else part.unpack(arguments) for part in cls._parts.values()))

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same call with this function of each of its tensors."""
        return type(self)(*(_mapped(getattr(self, name), function) for name in self._parts))


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Call):
        return value.map(function)
    return function(value) if isinstance(value, Tensor) else value


def is_call(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Call)
