"""The task of a run: model, tokenizer, training and held-out rows, from a dataset or a built-in task."""

from __future__ import annotations

import inspect
import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_kernels.rewards import RewardFunction, check_name, completion_text, resolve
from grpo_kernels.rewards.completions import plain_message
from grpo_kernels.rewards.scoring import ARGUMENTS
from grpo_kernels.training.augmentation import prompt_key
from grpo_kernels.training.dataset_files import read_file
from grpo_kernels.training.dataset_splits import open_dataset
from grpo_kernels.training.gsm8k import with_solutions
from grpo_kernels.training.models import load_pretrained
from grpo_kernels.training.recipe import Recipe
from grpo_kernels.training.tasks import TASKS, Row, build_model

_LOGGER = logging.getLogger(__name__)

_HELD_OUT = 200  # problems, unless a recipe says how many; of one split that is cut in two a fifth at most


class Task(NamedTuple):
    """What is trained, on what, and what it is measured on."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train_rows: list[Row]  # with at least "prompt"
    eval_rows: list[Row]
    reward_functions: dict[str, RewardFunction]  # by the names that metrics show


def load_task(recipe: Recipe, rows: Sequence[Row] | None = None, *, least: int | None = None) -> Task:
    """Loads or builds everything a recipe names.

    Args:
        recipe: Names the dataset and the model.
        rows: To train on in the place of the dataset's own; what is held out stays the dataset's.
        least: Training rows that there must be; by default one generation's prompts.

    Raises:
        ValueError: The dataset cannot be found, a column is missing, there are too few rows, a reward function is
            unknown, or no model is named for a dataset that has none.
    """
    train_rows, eval_rows = load_task_rows(recipe)
    train_rows = train_rows if rows is None else list(rows)
    if len(train_rows) < (recipe.prompts_per_generation if least is None else least):
        needed = f"{recipe.prompts_per_generation} training rows (one generation's prompts)"
        raise ValueError(
            f"dataset {recipe.dataset_name!r} must have at least "
            f"{needed if least is None else f'{least} training rows'}, got {len(train_rows)} beside the "
            f"{len(eval_rows)} that num_eval_prompts holds out, with all rows that ask the same: give more rows, or "
            "set a smaller num_eval_prompts"
        )
    reward_functions = {name: resolve(name) for name in recipe.reward_funcs}
    if recipe.check is not None:
        resolve(recipe.check, key="check")  # before any work
    model, tokenizer = load_model(recipe)
    return Task(model, tokenizer, train_rows, eval_rows, reward_functions)


def load_task_rows(recipe: Recipe) -> tuple[list[Row], list[Row]]:
    """The training and the held-out rows of a recipe's dataset; raises ValueError as ``load_task``."""
    if recipe.dataset_name in TASKS:
        held_out = _HELD_OUT if recipe.num_eval_prompts is None else recipe.num_eval_prompts
        return TASKS[recipe.dataset_name].build_rows(recipe.seed, held_out)
    return _load_splits(recipe)


def columns_needed(recipe: Recipe) -> tuple[str, ...]:
    """``prompt``, and ``answer`` where a reward function of the recipe takes it, or the judge where one is needed."""
    names = list(recipe.reward_funcs)
    if recipe.num_eval_prompts != 0 or recipe.min_pass_rate is not None or recipe.max_pass_rate is not None:
        names.append(check_name(recipe.check, names))
    takes_answer = any("answer" in inspect.signature(resolve(name)).parameters for name in names)
    return ("prompt", "answer") if takes_answer else ("prompt",)


def load_model(recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model on its device, in eval mode (no dropout, so that log-probs can be recomputed), and its tokenizer."""
    if recipe.model_name_or_path is not None:
        model, tokenizer = load_pretrained(recipe)
    elif recipe.dataset_name in TASKS:
        tokenizer = TASKS[recipe.dataset_name].build_tokenizer(chat=recipe.prompt_template == "chat")
        model = build_model(tokenizer, recipe.seed, hidden_size=recipe.hidden_size).to(getattr(torch, recipe.dtype))
    else:
        raise ValueError(f"model_name_or_path must be given for dataset {recipe.dataset_name!r}, got None")
    return model.to(pick_device(recipe.device)).eval(), tokenizer


def pick_device(name: str) -> torch.device:
    """``name`` as a device, "auto" being CUDA where there is one.

    Raises:
        ValueError: There is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be a torch device or auto, got {name!r}: {error}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be one that is here, got {name!r}: torch sees no GPU")
    return device


def load_rows(
    dataset_name: str,
    *,
    config: str | None = None,
    split: str = "train",
    prompt_column: str | None = None,
    answer_column: str | None = None,
    needs_answer: bool = True,
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
            files, or a name on the Hub. ``dataset_files`` says how values are read.
        config: The configuration of a dataset that has several; GSM8K's is "main" unless another is named.
        split: Which split, or part of one, as ``train[:100]``. A file, or a dataset saved without splits, has "train".
        prompt_column: What the dataset calls ``prompt``; by default that, or ``question`` where there is none.
        answer_column: What it calls ``answer``; by default that.
        needs_answer: Whether it must have one; else what stands there under another name than ``answer`` stays there.

    Raises:
        ValueError: The dataset cannot be found, has no such split, or lacks a column or a value.
    """
    text_columns = [*filter(None, (prompt_column, answer_column)), "prompt", "question", "answer", "completion"]
    rows = open_dataset(dataset_name, config, text_columns, tuple(TASKS)).rows(split)
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


def _load_splits(recipe: Recipe) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows: two splits as they are, or one cut in two, no question on both sides of the cut."""
    name, held_out_split = recipe.dataset_name, recipe.eval_dataset_split
    names_a_split = held_out_split is not None and "[" not in held_out_split
    if names_a_split and open_dataset(name, recipe.dataset_config, (), tuple(TASKS)).is_single:
        raise ValueError(
            f"eval_dataset_split must be None for {name!r}, which has one split, got {held_out_split!r}; a part of "
            "it is train[90%:]"
        )
    columns = {
        "prompt_column": recipe.prompt_column,
        "answer_column": recipe.answer_column,
        "needs_answer": "answer" in columns_needed(recipe),
    }
    rows = load_rows(name, config=recipe.dataset_config, split=recipe.dataset_split, **columns)
    if not rows:
        raise ValueError(f"dataset {name!r} has no rows")
    if held_out_split is not None:
        held_out = load_rows(name, config=recipe.dataset_config, split=held_out_split, **columns)
        return rows, held_out[: _HELD_OUT if recipe.num_eval_prompts is None else recipe.num_eval_prompts]
    random.Random(recipe.seed).shuffle(rows)
    count = min(_HELD_OUT, len(rows) // 5) if recipe.num_eval_prompts is None else recipe.num_eval_prompts
    eval_rows = rows[:count]
    asked = {prompt_key(row) for row in eval_rows}
    return [row for row in rows[count:] if prompt_key(row) not in asked], eval_rows


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
