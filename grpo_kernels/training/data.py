"""The task of a run: model, tokenizer, training and held-out rows, from a dataset or the built-in addition."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from grpo_kernels.training import addition
from grpo_kernels.training.recipe import Recipe
from grpo_kernels.training.rewards import RewardFunction, resolve

Row = dict[str, Any]


class Task(NamedTuple):
    """What is trained, on what, and what it is measured on."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train_rows: list[Row]  # with at least "prompt" and "answer"
    eval_rows: list[Row]
    reward_functions: dict[str, RewardFunction]  # by the names that metrics show


def load_task(recipe: Recipe) -> Task:
    """Loads or builds everything a recipe names.

    Raises:
        ValueError: A column is missing, there are too few rows, a reward function is unknown, or no model is named for
            a dataset that has none.
    """
    if recipe.dataset_name == "addition":
        train_rows, eval_rows = addition.build_rows(recipe.seed, recipe.num_eval_prompts)
    else:
        train_rows, eval_rows = _load_splits(recipe)
    if len(train_rows) < recipe.prompts_per_generation:
        raise ValueError(
            f"dataset {recipe.dataset_name!r} must have at least {recipe.prompts_per_generation} training rows "
            f"(one generation's prompts), got {len(train_rows)}"
        )
    reward_functions = {name: resolve(name) for name in recipe.reward_funcs}
    model, tokenizer = load_model(recipe)
    return Task(model, tokenizer, train_rows, eval_rows, reward_functions)


def load_model(recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model on its device, in eval mode (no dropout, so that log-probs can be recomputed), and its tokenizer."""
    if recipe.model_name_or_path is not None:
        tokenizer = AutoTokenizer.from_pretrained(recipe.model_name_or_path, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(recipe.model_name_or_path, dtype=getattr(torch, recipe.dtype))
    elif recipe.dataset_name == "addition":
        tokenizer = addition.build_tokenizer()
        model = addition.build_model(tokenizer, recipe.seed).to(getattr(torch, recipe.dtype))
    else:
        raise ValueError(f"model_name_or_path must be given for dataset {recipe.dataset_name!r}, got None")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {recipe.model_name_or_path!r} must have an end-of-sequence token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(pick_device(recipe.device)).eval(), tokenizer


def pick_device(name: str) -> torch.device:
    """``name`` as a device, "auto" being CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def render_prompt(row: Row, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None) -> str:
    """The text a row's completion continues: a string as it is, chat messages through the chat template.

    With a ``system_prompt``, a string too becomes a user message.
    """
    prompt = row["prompt"]
    if isinstance(prompt, str) and system_prompt is None:
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system_prompt is not None:
        messages = [{"role": "system", "content": system_prompt}, *messages]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def read_jsonl(path: Path) -> list[Row]:
    """One JSON object a line; blank lines are skipped.

    Raises:
        ValueError: A line is not a JSON object; the message names it.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
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


def _load_splits(recipe: Recipe) -> tuple[list[Row], list[Row]]:
    train_rows = _load_rows(recipe, recipe.dataset_split)
    if recipe.eval_dataset_split is not None:
        return train_rows, _load_rows(recipe, recipe.eval_dataset_split)[: recipe.num_eval_prompts]
    random.Random(recipe.seed).shuffle(train_rows)
    return train_rows[recipe.num_eval_prompts :], train_rows[: recipe.num_eval_prompts]


def _load_rows(recipe: Recipe, split: str) -> list[Row]:
    path = Path(recipe.dataset_name)
    if path.suffix == ".jsonl":
        rows = read_jsonl(path)
    else:
        import datasets  # only a run on a folder or a Hub name needs it

        if (path / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(str(path))[split].to_list()
        elif (path / "state.json").is_file():
            rows = datasets.load_from_disk(str(path)).to_list()
        else:
            rows = datasets.load_dataset(recipe.dataset_name, recipe.dataset_config, split=split).to_list()
    for number, row in enumerate(rows):
        missing = sorted({"prompt", "answer"} - row.keys())
        if missing:
            raise ValueError(
                f"dataset {recipe.dataset_name!r}: row {number} must have columns prompt and answer; "
                f"it lacks {', '.join(missing)} and has {', '.join(sorted(row))}"
            )
    return rows
