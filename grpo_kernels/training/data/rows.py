"""Rows of a dataset under the names that training knows: ``prompt``, ``answer``, ``completion``."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_kernels.rewards.completions import completion_text, plain_message
from grpo_kernels.rewards.scoring import ARGUMENTS
from grpo_kernels.training.data.files import Row, read_file
from grpo_kernels.training.data.gsm8k import with_solutions
from grpo_kernels.training.data.splits import open_dataset
from grpo_kernels.training.tasks import TASKS

_LOGGER = logging.getLogger(__name__)


def load_rows(
    dataset_name: str,
    *,
    config: str | None = None,
    split: str = "train",
    prompt_column: str | None = None,
    answer_column: str | None = None,
    needs_answer: bool = True,
    seed: int = 0,
) -> list[Row]:
    """The rows of a dataset, with the columns ``prompt`` and ``answer`` whatever it calls them.

    Two kinds of columns are left out, with a warning. With ``prompt_column="question"`` the column ``question`` becomes
    ``prompt``, and the dataset's own column ``prompt`` is left out; ``answer`` likewise. A column with the name of an
    argument of reward functions, as ``completions`` or ``trainer_state``, is left out too.

    Answers that end in a line ``#### 42``, as GSM8K's do, become the result alone. The worked text is kept in the
    column ``solution`` and, in the form of a completion, in ``completion``, for a cold start. Code that comes with a
    dataset is never run.

    Args:
        dataset_name: A file (.jsonl, .json, .csv, .parquet), a folder that ``save_to_disk`` wrote, a folder of data
            files, a name on the Hub or ``reasoning_gym/`` and a name there. ``data.files`` says how values are read.
        config: The configuration of a dataset that has several; GSM8K's is "main" unless another is named.
        split: Which split, or part of one, as ``train[:100]``. A file, or a dataset saved without splits, has "train".
        prompt_column: What the dataset calls ``prompt``; by default that, or ``question`` where there is none.
        answer_column: What it calls ``answer``; by default that.
        needs_answer: Whether it must have one; else what stands there under another name than ``answer`` stays there.
        seed: Of a dataset that is generated.

    Raises:
        ValueError: The dataset cannot be found, has no such split, or lacks a column or a value.
    """
    text_columns = [*filter(None, (prompt_column, answer_column)), "prompt", "question", "answer", "completion"]
    rows = open_dataset(dataset_name, config, text_columns, tuple(TASKS), seed=seed).rows(split)
    if prompt_column is None:
        is_question = bool(rows) and "prompt" not in rows[0] and "question" in rows[0]
        prompt_column = "question" if is_question else "prompt"
    names = {"prompt": prompt_column}
    has_answer = needs_answer or answer_column is not None
    if has_answer:
        names["answer"] = answer_column or "answer"
    where = f"dataset {dataset_name!r}"
    renamed = [_renamed(row, names, f"{where}: row {number}") for number, row in enumerate(rows)]
    _warn_of_reserved_names(rows, names, where)
    return with_solutions(renamed, where) if has_answer else renamed


def read_rows(path: Path, columns: Sequence[str]) -> list[Row]:
    """The rows of a file that a stage wrote, or a person: .jsonl, .json, .csv or .parquet.

    Args:
        path: The file.
        columns: Each row must have a value in these.

    Raises:
        ValueError: The file cannot be read, has no row, or a row lacks one of the columns; the message names it.
    """
    rows = read_file(path, text_columns=("prompt", "answer", "completion"))
    if not rows:
        raise ValueError(f"{path} must have rows, got none")
    for number, row in enumerate(rows):
        missing = [name for name in columns if row.get(name) in (None, "")]
        if missing:
            raise ValueError(
                f"{path}: row {number} must have {', '.join(columns)}; it lacks {', '.join(missing)} and has "
                f"{', '.join(sorted(row))}"
            )
    rows = [_with_texts(row, f"{path}: row {number}") for number, row in enumerate(rows)]
    return [row | {"prompt": _prompt(row["prompt"], f"{path}: row {n}")} for n, row in enumerate(rows)]


class RowOrder:
    """An endless shuffle of the rows, each epoch in another order, that knows how far it is.

    Args:
        rows: What to shuffle.
        seed: Of the orders.
    """

    def __init__(self, rows: list[Row], seed: int) -> None:
        self.drawn = 0
        self._rows, self._rng, self._epoch = rows, random.Random(seed), []

    def take(self, count: int) -> list[Row]:
        """The next rows."""
        return [self._next() for _ in range(count)]

    def _next(self) -> Row:
        if not self._epoch:
            self._epoch = self._rng.sample(self._rows, len(self._rows))[::-1]
        self.drawn += 1
        return self._epoch.pop()

    @property
    def digest(self) -> str:
        """Of the rows in their order, so that a dataset that was changed between two runs is found."""
        checksum = hashlib.sha256()
        for row in self._rows:
            checksum.update(repr(row).encode(errors="surrogatepass"))
        return checksum.hexdigest()


def _renamed(row: Row, names: dict[str, str], where: str) -> Row:
    """The row with ``prompt`` and ``answer`` under these names.

    Args:
        row: As the dataset has it.
        names: From our names to the dataset's.
        where: Names the row in an error.
    """
    missing = sorted(set(names.values()) - row.keys())
    if missing:
        raise ValueError(
            f"{where} must have columns {' and '.join(names.values())}; it lacks {', '.join(missing)} and has "
            f"{', '.join(sorted(row)) or 'none'} (prompt_column and answer_column name others)"
        )
    for name in names.values():
        if row[name] is None:
            raise ValueError(f"{where} must have a value in column {name}, got None")
    rest = {column: value for column, value in row.items() if column not in (*names.values(), *ARGUMENTS)}
    renamed = {**rest, **{name: row[column] for name, column in names.items()}}
    return _with_texts({**renamed, "prompt": _prompt(renamed["prompt"], where)}, where)


def _prompt(value: Any, where: str) -> str | list[dict[str, Any]]:
    """A text, or chat messages with a text each; a number is the text of it."""
    if isinstance(value, (str, int, float)):
        return str(value)
    try:
        if isinstance(value, list) and value:
            return [plain_message(message) for message in value]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    raise ValueError(f"{where} must have a text or chat messages as its prompt, got {value!r:.80}")


def _with_texts(row: Row, where: str) -> Row:
    """The row with texts as its ``completion`` and ``completion_prefix``, whatever a file has there."""
    texts = dict(row)
    for name in ("completion", "completion_prefix"):
        value = row.get(name)
        if isinstance(value, (int, float)):
            texts[name] = str(value)
        elif isinstance(value, list) and value and all(isinstance(m, dict) for m in value):
            texts[name] = completion_text(value)
        elif value is not None and not isinstance(value, str):
            raise ValueError(f"{where} must have a text or messages as its {name}, got {value!r:.80}")
    return texts


def _warn_of_reserved_names(rows: Sequence[Row], names: dict[str, str], where: str) -> None:
    """Warns of columns that are left out, for their name is another's here."""
    columns = dict.fromkeys(column for row in rows for column in row)
    taken = {name for name, column in names.items() if name != column} | set(ARGUMENTS)
    lost = [column for column in columns if column in taken and column not in names.values()]
    if lost:
        _LOGGER.warning("%s: column %s is left out: its name is taken", where, " and ".join(lost))
