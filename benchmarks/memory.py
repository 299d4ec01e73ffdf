"""Peaks of resident memory, by the kernel's own count (Linux)."""

from __future__ import annotations

from pathlib import Path
from typing import Self

_PROCESS = Path("/proc/self")


class Peak:
    """``bytes``: what the block added to the memory that was resident before it, at the highest."""

    bytes = 0

    def __enter__(self) -> Self:
        (_PROCESS / "clear_refs").write_text("5")  # the highest so far is forgotten
        self._before = _resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = max(0, _resident("VmHWM") - self._before)


def _resident(name: str) -> int:
    lines = (_PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def available() -> int:
    """Bytes that can be allocated before the system runs out."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
