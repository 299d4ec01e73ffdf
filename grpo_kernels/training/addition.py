"""The first of the built-in tasks, two-digit addition, as functions: what a script needs for a model that learns it."""

from __future__ import annotations

import random

from grpo_kernels.training.tasks import TASKS, build_model

__all__ = ["WORDS", "build_model", "build_rows", "build_tokenizer", "trace"]

_TASK = TASKS["addition"]
WORDS = list(_TASK.words)
build_tokenizer = _TASK.build_tokenizer
build_rows = _TASK.build_rows


def trace(a: int, b: int, rng: random.Random | None = None) -> str:
    """The worked sum of two two-digit numbers; with ``rng``, one written digit is wrong and later steps follow it."""
    return _TASK.trace((a, b), rng)
