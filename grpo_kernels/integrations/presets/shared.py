"""What several frameworks' options have in common."""

from __future__ import annotations

from typing import Any

#: Corrections of tokens by a name that NeMo-RL and OpenRLHF share.
CORRECTIONS = {"tis": "truncate", "icepop": "mask"}


def delta_of_dual_clip(name: str, value: float | None, high: float) -> dict[str, Any]:
    """A lower bound of a negative advantage's term, as ``delta``, which it is above the clip range.

    Raises:
        ValueError: It is not above it.
    """
    if value is None:
        return {}
    if not value > 1 + high:
        raise ValueError(f"{name} must be greater than 1 plus the upper clip range, {1 + high}, got {value!r}")
    return {"delta": value}
