"""The task of a run: model, tokenizer, training and held-out rows, from a dataset or a built-in task."""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_kernels.training.augmentation import prompt_key
from grpo_kernels.training.gsm8k import with_solutions
from grpo_kernels.training.models import load_pretrained
from grpo_kernels.training.recipe import Recipe
from grpo_kernels.training.rewards import RewardFunction, resolve
from grpo_kernels.training.rewards.answers import judge_name
from grpo_kernels.training.tasks import TASKS, Row, build_model

_FILE_FORMATS = {".parquet": "parquet", ".csv": "csv", ".json": "json"}
_GSM8K = ("openai/gsm8k", "gsm8k")


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
            f"{needed if least is None else f'{least} training rows'}, got {len(train_rows)}"
        )
    reward_functions = {name: resolve(name) for name in recipe.reward_funcs}
    if recipe.check is not None:
        resolve(recipe.check)  # before any work
    model, tokenizer = load_model(recipe)
    return Task(model, tokenizer, train_rows, eval_rows, reward_functions)


def load_task_rows(recipe: Recipe) -> tuple[list[Row], list[Row]]:
    """The training and the held-out rows of a recipe's dataset; raises ValueError as ``load_task``."""
    if recipe.dataset_name in TASKS:
        return TASKS[recipe.dataset_name].build_rows(recipe.seed, recipe.num_eval_prompts)
    return _load_splits(recipe)


def columns_needed(recipe: Recipe) -> tuple[str, ...]:
    """``prompt``, and ``answer`` where a reward function of the recipe takes it, or the judge where one is needed."""
    names = list(recipe.reward_funcs)
    if recipe.num_eval_prompts or recipe.min_pass_rate is not None or recipe.max_pass_rate is not None:
        names.append(recipe.check or judge_name(names))
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

    Answers that end in a line ``#### 42``, as GSM8K's do, become the result alone. The worked text is kept in the
    column ``solution`` and, in the form of a completion, in ``completion``, for a cold start. Code that comes with a
    dataset is never run.

    Args:
        dataset_name: A file (.jsonl, .json, .csv, .parquet), a folder that ``save_to_disk`` wrote, a folder of data
            files, or a name on the Hub.
        config: The configuration of a dataset that has several; GSM8K's is "main" unless another is named.
        split: Which split of a dataset that has several; a file or a saved single dataset has one, and gives it.
        prompt_column: What the dataset calls ``prompt``; by default that, or ``question`` where there is none.
        answer_column: What it calls ``answer``; by default that.
        needs_answer: Whether it must have one; else what stands there under another name than ``answer`` stays there.

    Raises:
        ValueError: The dataset cannot be found, has no such split, or lacks a column or a value.
    """
    rows = _read(dataset_name, config, split)
    if prompt_column is None:
        is_question = bool(rows) and "prompt" not in rows[0] and "question" in rows[0]
        prompt_column = "question" if is_question else "prompt"
    names = {"prompt": prompt_column}
    has_answer = needs_answer or answer_column is not None
    if has_answer:
        names["answer"] = answer_column or "answer"
    renamed = [_renamed(row, names, f"dataset {dataset_name!r}: row {number}") for number, row in enumerate(rows)]
    return with_solutions(renamed, f"dataset {dataset_name!r}") if has_answer else renamed


def read_jsonl(path: Path) -> list[Row]:
    """One JSON object a line; blank lines are skipped.

    Raises:
        ValueError: The file cannot be read, or a line is not a JSON object; the message names it.
    """
    rows = []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    # by newlines alone: splitlines() would also cut at separators that may stand inside a JSON string
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: expected a JSON object, got {line[:60]!r}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
        rows.append(row)
    return rows


def read_rows(path: Path, columns: Sequence[str]) -> list[Row]:
    """The rows of a .jsonl file that a stage wrote, or a person.

    Args:
        path: The file.
        columns: Each row must have a value in these.

    Raises:
        ValueError: The file cannot be read, has no row, or a row lacks one of the columns; the message names it.
    """
    rows = read_jsonl(path)
    if not rows:
        raise ValueError(f"{path} must have rows, got none")
    for number, row in enumerate(rows):
        missing = [name for name in columns if row.get(name) in (None, "")]
        if missing:
            raise ValueError(
                f"{path}: row {number} must have {', '.join(columns)}; it lacks {', '.join(missing)} and has "
                f"{', '.join(sorted(row))}"
            )
    return rows


def _load_splits(recipe: Recipe) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows: two splits as they are, or one cut in two, no question on both sides of the cut."""
    name, held_out_split = recipe.dataset_name, recipe.eval_dataset_split
    if held_out_split is not None and _is_single(Path(name)):
        raise ValueError(f"eval_dataset_split must be None for {name!r}, which has one split, got {held_out_split!r}")
    columns = {
        "prompt_column": recipe.prompt_column,
        "answer_column": recipe.answer_column,
        "needs_answer": "answer" in columns_needed(recipe),
    }
    rows = load_rows(name, config=recipe.dataset_config, split=recipe.dataset_split, **columns)
    if held_out_split is not None:
        held_out = load_rows(name, config=recipe.dataset_config, split=held_out_split, **columns)
        return rows, held_out[: recipe.num_eval_prompts]
    random.Random(recipe.seed).shuffle(rows)
    eval_rows = rows[: recipe.num_eval_prompts]
    asked = {prompt_key(row) for row in eval_rows}
    return [row for row in rows[recipe.num_eval_prompts :] if prompt_key(row) not in asked], eval_rows


def _is_single(path: Path) -> bool:
    """Whether a dataset has no splits: one file, or a single dataset saved to a folder."""
    return path.suffix in (".jsonl", *_FILE_FORMATS) or (path / "state.json").is_file()


def _read(dataset_name: str, config: str | None, split: str) -> list[Row]:
    path = Path(dataset_name)
    if path.suffix == ".jsonl":
        return read_jsonl(path)
    import datasets  # seconds of import that only a run on a folder or a Hub name needs

    is_saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    if is_saved or path.suffix in _FILE_FORMATS:
        try:
            if is_saved:
                found = datasets.load_from_disk(str(path))
            else:
                found = datasets.load_dataset(_FILE_FORMATS[path.suffix], data_files=str(path), split="train")
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"dataset {dataset_name!r} cannot be read: {error.__cause__ or error}") from error
        if not isinstance(found, datasets.DatasetDict):
            return found.to_list()
        if split not in found:
            raise ValueError(f"dataset {dataset_name!r} has no split {split!r}; it has {', '.join(found)}")
        return found[split].to_list()
    if config is None and dataset_name in _GSM8K:
        config = "main"
    try:
        return datasets.load_dataset(dataset_name, config, split=split).to_list()
    except OSError as error:  # not found, or no connection
        raise ValueError(
            f"dataset_name must be a built-in task ({', '.join(TASKS)}), a file, a folder or a name on the Hub, "
            f"got {dataset_name!r}: {error}"
        ) from error


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
            f"{', '.join(sorted(row))} (prompt_column and answer_column name others)"
        )
    for name in names.values():
        if row[name] is None:
            raise ValueError(f"{where} must have a value in column {name}, got None")
    rest = {column: value for column, value in row.items() if column not in names.values()}
    return {**rest, **{name: row[column] for name, column in names.items()}}
