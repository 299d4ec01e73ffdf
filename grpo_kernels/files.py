"""Files that are there as a whole or not at all, whenever their writing ends."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden path beside ``path`` to write to; it takes its place at the end of the block.

    A block that raises, as on a full disk, leaves ``path`` as it was and nothing beside it.
    """
    unfinished = path.with_name(f".{path.name}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str) -> Path:
    """Writes a text as a whole, in UTF-8; returns ``path``."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    return path
