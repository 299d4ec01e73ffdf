"""Checkpoints that are either complete or absent: written beside their place, then renamed into it."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NAME = re.compile(r"checkpoint-(\d+)")


def save_checkpoint(
    output_dir: Path, step: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, keep: int
) -> Path:
    """Writes ``checkpoint-<step>``, loadable by ``from_pretrained``, and deletes all but the newest ``keep``.

    The folder appears under its name only when it is whole; an interrupted write leaves a hidden folder, which the
    next one replaces.
    """
    final = output_dir / f"checkpoint-{step}"
    unfinished = output_dir / ".unfinished-checkpoint"
    _remove(unfinished)
    unfinished.mkdir(parents=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    _remove(final)
    os.replace(unfinished, final)
    for old in list_checkpoints(output_dir)[:-keep]:
        _remove(old)
    return final


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [(int(match[1]), path) for path in output_dir.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def clear_run(output_dir: Path) -> None:
    """Deletes what a run writes into ``output_dir``, and nothing else that stands there."""
    for path in list_checkpoints(output_dir):
        _remove(path)
    _remove(output_dir / ".unfinished-checkpoint")
    for name in ("metrics.jsonl", "curves.png"):
        (output_dir / name).unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    """Deletes a folder that first loses its name, so that an interruption leaves no checkpoint with parts missing."""
    doomed = folder.parent / ".deleted-checkpoint"
    if doomed.exists():
        shutil.rmtree(doomed)
    if folder.exists():
        os.replace(folder, doomed)
        shutil.rmtree(doomed)
