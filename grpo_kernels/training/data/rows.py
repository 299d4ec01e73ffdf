"""Rows of a dataset under the names that training knows: ``prompt``, ``answer``, ``completion``."""

from __future__ import annotations

import hashlib
import logging
import random
import re
from collections.abc import Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

from grpo_kernels.rewards.completions import completion_text, plain_message
from grpo_kernels.rewards.scoring import ARGUMENTS
from grpo_kernels.training.addition import TASKS
from grpo_kernels.training.data.files import Row, open_dataset, read_file

_LOGGER = logging.getLogger(__name__)
# how GSM8K (arXiv:2110.14168) writes a solution: calculations as <<48/2=24>>, and a last line "#### 72"
_FINAL = "####"
_MARK = re.compile(r"<<[^<>]*>>")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3})")


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

    Two kinds of columns are left out, with a warning: the dataset's own ``prompt`` where another column becomes that,
    ``answer`` likewise, and one with the name of an argument of reward functions, as ``completions``. Answers as
    GSM8K's become the result alone, as ``with_solutions`` says. Code that comes with a dataset is never run.

    Args:
        dataset_name: A file, a folder of files, one that ``save_to_disk`` wrote, a name on the Hub, or
            ``reasoning_gym/`` and a name there.
        config: The configuration of a dataset that has several; GSM8K's is "main" unless another is named.
        split: Which split, or part of one, as ``train[:100]``. A file, or a dataset saved without splits, has "train".
        prompt_column: What the dataset calls ``prompt``; by default that, or ``question`` where there is none.
        answer_column: What it calls ``answer``; by default that.
        needs_answer: Whether each row must have one.
        seed: Of a dataset that is generated.
    """
    text_columns = [*filter(None, (prompt_column, answer_column)), "prompt", "question", "answer", "completion"]
    rows = open_dataset(dataset_name, config, text_columns, tuple(TASKS), seed=seed).rows(split)
    first = rows[0] if rows else {}
    usual_column = "question" if "question" in first and "prompt" not in first else "prompt"
    names = {"prompt": usual_column if prompt_column is None else prompt_column}
    if needs_answer or answer_column is not None:
        names["answer"] = answer_column or "answer"
    where = f"dataset {dataset_name!r}"
    reserved = {*names, *ARGUMENTS} - {*names.values()}
    left_out = [column for column in dict.fromkeys(column for row in rows for column in row) if column in reserved]
    rows = [_renamed(row, names, f"{where}: row {number}") for number, row in enumerate(rows)]
    if left_out:
        _LOGGER.warning("%s: column %s is left out: its name is taken", where, " and ".join(left_out))
    return with_solutions(rows, where) if "answer" in names else rows


def read_rows(path: Path, columns: Sequence[str]) -> list[Row]:
    """The rows of a file that a stage wrote, or a person; raises ValueError where one has no value in the columns."""
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
    return [_with_texts(row, f"{path}: row {number}") for number, row in enumerate(rows)]


class RowOrder:
    """An endless shuffle of one row or more, each epoch in another order, that knows how far it is."""

    def __init__(self, rows: list[Row], seed: int) -> None:
        rng = random.Random(seed)
        self.drawn = 0
        self._rows = rows
        self._shuffled = (row for _ in count() for row in rng.sample(rows, len(rows)))

    def take(self, number: int) -> list[Row]:
        """The next rows."""
        self.drawn += number
        return list(islice(self._shuffled, number))

    @property
    def digest(self) -> str:
        """Of the rows in their order, so that a dataset that was changed between two runs is found."""
        checksum = hashlib.sha256()
        for row in self._rows:
            checksum.update(repr(row).encode(errors="surrogatepass"))
        return checksum.hexdigest()


def split_solution(text: str) -> tuple[str, str] | None:
    """The worked solution and the result (without commas) of a text whose last line is ``#### result``, or None."""
    *solution, last = text.strip().split("\n")
    result = last.removeprefix(_FINAL).strip()
    if not last.startswith(_FINAL) or not result:
        return None
    return "\n".join(solution).rstrip(), _THOUSANDS.sub("", result)


def worked_completion(solution: str, answer: str) -> str:
    """A solution as a completion in the form of the format reward, without the marks of its calculations."""
    return f"<think>\n{_MARK.sub('', solution)}\n</think>\n<answer>{answer}</answer>"


def with_solutions(rows: Sequence[Row], where: str) -> list[Row]:
    """Rows with the result alone as their ``answer``, the worked text as ``solution``, and both as a ``completion``.

    A solution or a completion that a row has already stays. Where the first row's answer does not end in
    ``#### result``, rows come back as they are. Raises ValueError where that one does and another's does not.
    """
    solved: list[Row] = []
    for number, row in enumerate(rows):
        parts = split_solution(str(row["answer"]))
        if parts is None and number == 0:
            return list(rows)
        if parts is None:
            raise ValueError(
                f"{where}: the answer of row {number} must end in a line {_FINAL} and the result, as row 0's does, "
                f"got {str(row['answer'])[-60:]!r}"
            )
        solution, answer = parts
        texts = {"solution": solution, "completion": worked_completion(solution, answer)}
        solved.append(row | {"answer": answer} | {name: row.get(name) or text for name, text in texts.items()})
    return solved


def _renamed(row: Row, names: dict[str, str], where: str) -> Row:
    """The row with ``names``, from ours to the dataset's, and its other columns where their name is not taken."""
    missing = sorted({*names.values()} - row.keys())
    if missing:
        raise ValueError(
            f"{where} must have columns {' and '.join(names.values())}; it lacks {', '.join(missing)} and has "
            f"{', '.join(sorted(row)) or 'none'} (prompt_column and answer_column name others)"
        )
    for column in names.values():
        if row[column] is None:
            raise ValueError(f"{where} must have a value in column {column}, got None")
    reserved = {*names, *names.values(), *ARGUMENTS}
    others = {column: value for column, value in row.items() if column not in reserved}
    return _with_texts(others | {name: row[column] for name, column in names.items()}, where)


def _with_texts(row: Row, where: str) -> Row:
    """The row with a text or messages as its prompt, and texts as its ``completion`` and ``completion_prefix``."""
    texts = {"prompt": _prompt(row["prompt"], where)}
    for name in ("completion", "completion_prefix"):
        value = row.get(name)
        if isinstance(value, (int, float)):
            texts[name] = str(value)
        elif isinstance(value, list) and value and all(isinstance(m, dict) for m in value):
            texts[name] = completion_text(value)
        elif value is not None and not isinstance(value, str):
            raise ValueError(f"{where} must have a text or messages as its {name}, got {value!r:.80}")
    return row | texts


def _prompt(value: Any, where: str) -> str | list[dict[str, Any]]:
    """A text, or chat messages with a text each; a number is the text of it."""
    if isinstance(value, (str, int, float)):
        return str(value)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where} must have a text or chat messages as its prompt, got {value!r:.80}")
    try:
        return [plain_message(message) for message in value]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
