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

from grpo_kernels.training.augmentation import prompt_key
from grpo_kernels.training.dataset_files import SUFFIXES, plain_rows, read_file, read_jsonl
from grpo_kernels.training.errors import described
from grpo_kernels.training.gsm8k import with_solutions
from grpo_kernels.training.hub import check_folder, use_cache_if_unreachable
from grpo_kernels.training.models import load_pretrained
from grpo_kernels.training.recipe import Recipe
from grpo_kernels.training.rewards import RewardFunction, check_name, resolve
from grpo_kernels.training.rewards.scoring import ARGUMENTS
from grpo_kernels.training.tasks import TASKS, Row, build_model

_LOGGER = logging.getLogger(__name__)

_HELD_OUT = 200  # problems, unless a recipe says how many; of one split that is cut in two a fifth at most
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
            f"{needed if least is None else f'{least} training rows'}, got {len(train_rows)} beside "
            f"{len(eval_rows)} that are held out, with all rows that ask the same: give more rows, or set a smaller "
            "num_eval_prompts"
        )
    reward_functions = {name: resolve(name) for name in recipe.reward_funcs}
    if recipe.check is not None:
        resolve(recipe.check)  # before any work
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

    A column that has the name of one of ours, but is not the one that is asked for, is left out with a warning:
    ``prompt`` beside a ``prompt_column`` of another name, or an argument of reward functions as ``completions``.

    Answers that end in a line ``#### 42``, as GSM8K's do, become the result alone. The worked text is kept in the
    column ``solution`` and, in the form of a completion, in ``completion``, for a cold start. Code that comes with a
    dataset is never run.

    Args:
        dataset_name: A file (.jsonl, .json, .csv, .parquet), a folder that ``save_to_disk`` wrote, a folder of data
            files, or a name on the Hub. ``dataset_files`` says how values are read.
        config: The configuration of a dataset that has several; GSM8K's is "main" unless another is named.
        split: Which split of a dataset that has several; a file or a saved single dataset has one, and gives it.
        prompt_column: What the dataset calls ``prompt``; by default that, or ``question`` where there is none.
        answer_column: What it calls ``answer``; by default that.
        needs_answer: Whether it must have one; else what stands there under another name than ``answer`` stays there.

    Raises:
        ValueError: The dataset cannot be found, has no such split, or lacks a column or a value.
    """
    text_columns = [*filter(None, (prompt_column, answer_column)), "prompt", "question", "answer"]
    rows = _read(dataset_name, config, split, text_columns)
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
        return rows, held_out[: _HELD_OUT if recipe.num_eval_prompts is None else recipe.num_eval_prompts]
    random.Random(recipe.seed).shuffle(rows)
    count = min(_HELD_OUT, len(rows) // 5) if recipe.num_eval_prompts is None else recipe.num_eval_prompts
    eval_rows = rows[:count]
    asked = {prompt_key(row) for row in eval_rows}
    return [row for row in rows[count:] if prompt_key(row) not in asked], eval_rows


def _is_single(path: Path) -> bool:
    """Whether a dataset has no splits: one file, or a single dataset saved to a folder."""
    return path.suffix.lower() in (".jsonl", ".csv", ".parquet") or (path / "state.json").is_file()


def _read(name: str, config: str | None, split: str, text_columns: Sequence[str]) -> list[Row]:
    path = Path(name).expanduser()
    if path.suffix.lower() in SUFFIXES:
        return read_file(path, split=split, text_columns=text_columns)
    check_folder("dataset_name", name)
    import datasets  # seconds of import that only a run on a folder or a Hub name needs

    if not path.is_dir():
        use_cache_if_unreachable()
        config = "main" if config is None and name in _GSM8K else config
    is_saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    try:
        found = datasets.load_from_disk(str(path)) if is_saved else datasets.load_dataset_builder(str(path), config)
    except Exception as error:
        known = f"a built-in task ({', '.join(TASKS)}), a file ({', '.join(SUFFIXES)}), a folder or a name on the Hub"
        raise ValueError(f"dataset_name must be {known}, got {name!r}: {described(error)}") from error
    return _saved(found, name, split) if is_saved else _of_files(found, name, split, text_columns)


def _saved(found: Any, name: str, split: str) -> list[Row]:
    """The rows of what ``save_to_disk`` wrote."""
    if hasattr(found, "to_list"):
        return plain_rows(found.to_list())
    if split not in found:
        raise ValueError(f"dataset {name!r} has no split {split!r}; it has {', '.join(found)}")
    return plain_rows(found[split].to_list())


def _of_files(builder: Any, name: str, split: str, text_columns: Sequence[str]) -> list[Row]:
    """The rows of a folder's or a Hub dataset's files: of these kinds they are read as single files are."""
    import datasets

    files = {str(key): [str(path) for path in paths] for key, paths in (builder.config.data_files or {}).items()}
    key, _, part = split.partition("[")
    is_ours = all(Path(path).suffix.lower() in SUFFIXES for paths in files.values() for path in paths)
    if files and is_ours and key not in files:
        raise ValueError(f"dataset {name!r} has no split {split!r}; it has {', '.join(files)}")
    try:
        if not files or not is_ours:
            builder.download_and_prepare()
            return plain_rows(builder.as_dataset(split=split).to_list())
        paths = datasets.DownloadManager().download(files[key])
    except Exception as error:
        raise ValueError(f"dataset {name!r} cannot be read: {described(error)}") from error
    options = {"split": key, "text_columns": text_columns}
    pairs = zip(paths, files[key], strict=True)
    rows = [row for path, file in pairs for row in read_file(Path(path), suffix=Path(file).suffix, **options)]
    if not part:
        return rows
    (begun,) = datasets.ReadInstruction.from_spec(split).to_absolute({key: len(rows)})
    return rows[begun.from_ : begun.to]


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
    rest = {column: value for column, value in row.items() if column not in (*names.values(), *ARGUMENTS)}
    found = {**rest, **{name: row[column] for name, column in names.items()}}
    return {**found, "prompt": _prompt(found["prompt"], where)}


def _prompt(value: Any, where: str) -> str | list[dict[str, Any]]:
    """A text, or chat messages; a number is the text of it."""
    if isinstance(value, (str, int, float)):
        return str(value)
    if isinstance(value, list) and value and all(isinstance(m, dict) and "role" in m for m in value):
        return value
    raise ValueError(f"{where} must have a text or chat messages as its prompt, got {value!r:.80}")


def _warn_of_reserved_names(rows: Sequence[Row], names: dict[str, str], where: str) -> None:
    """Warns of columns that are left out, for their name is another's here."""
    columns = dict.fromkeys(column for row in rows for column in row)
    taken = {name for name, column in names.items() if name != column} | set(ARGUMENTS)
    lost = [column for column in columns if column in taken and column not in names.values()]
    if lost:
        _LOGGER.warning("%s: column %s is left out: its name is taken", where, " and ".join(lost))
