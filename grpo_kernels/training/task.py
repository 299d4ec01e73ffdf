"""What a recipe or a stage names, loaded and built: model, tokenizer, rows, rewards, sampler, an evaluation's options.

``recipe`` is a ``Recipe`` or the options of a kind of stage, which have the same keys. Beside this module, ``run.py``,
the stages and ``GRPOLoop``, which is made from one, nothing reads them: the rest takes named values.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_kernels.rewards import RewardFunction, check_name, resolve
from grpo_kernels.training.addition import TASKS, build_model
from grpo_kernels.training.data.files import Row, open_dataset
from grpo_kernels.training.data.rows import load_rows
from grpo_kernels.training.data.templates import prompt_key, rows_that_fit
from grpo_kernels.training.models import add_adapters, is_deepspeed, load_pretrained, pick_device
from grpo_kernels.training.options import SamplerOptions
from grpo_kernels.training.rollout import Sampler
from grpo_kernels.training.samplers import ContinuousSampler, ModelSampler
from grpo_kernels.training.supervised import SupervisedStep, train_supervised

_HELD_OUT = 200  # problems, unless a recipe says how many; of one split that is cut in two a fifth at most


class Task(NamedTuple):
    """What is trained, on what, and what it is measured on."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train_rows: list[Row]  # with at least "prompt"
    eval_rows: list[Row]
    reward_functions: dict[str, RewardFunction]  # by the names that metrics show


def load_task(recipe: Any, rows: Sequence[Row] | None = None, *, least: int | None = None) -> Task:
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
    one_generation = "" if least is not None else " (one generation's prompts)"
    least = recipe.prompts_per_generation if least is None else least
    if len(train_rows) < least:
        raise ValueError(
            f"dataset {recipe.dataset_name!r} must have at least {least} training rows{one_generation}, got "
            f"{len(train_rows)} beside the {len(eval_rows)} that num_eval_prompts holds out, with all rows that ask "
            "the same: give more rows, or set a smaller num_eval_prompts"
        )
    reward_functions = {name: resolve(name) for name in recipe.reward_funcs}
    if recipe.check is not None:
        resolve(recipe.check, key="check")  # before any work
    model, tokenizer = load_model(recipe)
    return Task(model, tokenizer, train_rows, eval_rows, reward_functions)


def load_task_rows(recipe: Any) -> tuple[list[Row], list[Row]]:
    """The training and the held-out rows of a recipe's dataset; raises ValueError as ``load_task``."""
    if recipe.dataset_name in TASKS:
        held_out = _HELD_OUT if recipe.num_eval_prompts is None else recipe.num_eval_prompts
        return TASKS[recipe.dataset_name].build_rows(recipe.seed, held_out)
    return _load_splits(recipe)


def columns_needed(recipe: Any) -> tuple[str, ...]:
    """``prompt``, and ``answer`` where a reward function of the recipe takes it, or the judge where one is needed."""
    names = list(recipe.reward_funcs)
    bounds = [getattr(recipe, name, None) for name in ("min_pass_rate", "max_pass_rate")]
    evaluates = hasattr(recipe, "eval_samples") and recipe.num_eval_prompts != 0
    if evaluates or bounds != [None, None]:
        names.append(check_name(recipe.check, names))
    takes_answer = any("answer" in inspect.signature(resolve(name)).parameters for name in names)
    return ("prompt", "answer") if takes_answer else ("prompt",)


def load_model(recipe: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model on its device, in eval mode (no dropout, so that log-probs can be recomputed), and its tokenizer."""
    if recipe.model_name_or_path is not None:
        model, tokenizer = load_pretrained(
            recipe.model_name_or_path,
            dtype=recipe.dtype,
            attn_implementation=recipe.attn_implementation,
            trust_remote_code=recipe.trust_remote_code,
        )
    elif recipe.dataset_name in TASKS:
        tokenizer = TASKS[recipe.dataset_name].build_tokenizer(chat=recipe.prompt_template == "chat")
        model = build_model(tokenizer, recipe.seed, hidden_size=recipe.hidden_size).to(getattr(torch, recipe.dtype))
    else:
        raise ValueError(f"model_name_or_path must be given for dataset {recipe.dataset_name!r}, got None")
    return model.to(pick_device(recipe.device)).eval(), tokenizer


def prepare_model(model: PreTrainedModel, recipe: Any) -> Any:
    """The model with the recipe's adapters and gradient checkpointing, in eval mode."""
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not recipe.use_peft:
        return model.eval()
    return add_adapters(model, r=recipe.lora_r, alpha=recipe.lora_alpha, target_modules=recipe.lora_target_modules)


def build_sampler(task: Task, recipe: Any, accelerator: Accelerator, temperature: float = 1.0) -> Sampler:
    """The sampler that a recipe, or a stage, asks for, at a temperature.

    Raises:
        ServerError: The server cannot be reached, or does not offer what is needed.
        RuntimeError: Continuous batching, or the way for weights into the server, cannot run here.
        ValueError: One of the two is asked for under ZeRO-3, which leaves no process a weight to sample by or to send.
    """
    if is_deepspeed(accelerator) and accelerator.deepspeed_plugin.hf_ds_config.is_zero3():
        for name in ("use_vllm", "use_transformers_continuous_batching"):
            if getattr(recipe, name, False):
                raise ValueError(f"{name} must be False under ZeRO-3, which divides the weights; take ZeRO-2")
    options: dict[str, Any] = {
        "max_completion_length": recipe.max_completion_length,
        "temperature": temperature,
    }
    has_choice = isinstance(recipe, SamplerOptions)
    if has_choice and recipe.use_vllm:
        from grpo_kernels.training.samplers.server import ServerSampler  # only a run by a server needs it

        return ServerSampler(task.model, task.tokenizer, accelerator, **recipe.server_options(), **options)
    options["autocast"] = accelerator.autocast
    if has_choice and recipe.use_transformers_continuous_batching:
        return ContinuousSampler(task.model, task.tokenizer, options=recipe.continuous_batching_options(), **options)
    return ModelSampler(task.model, task.tokenizer, synced=accelerator.num_processes > 1, **options)


def evaluation_options(recipe: Any) -> dict[str, Any]:
    """The arguments of ``evaluation.evaluate``, ``measure_pass_rates`` and ``evaluate_samples``."""
    name = check_name(recipe.check, recipe.reward_funcs)
    return {
        "check": resolve(name),
        "check_name": name,
        "num_samples": recipe.eval_samples,
        "batch_size": recipe.eval_batch_size,
        "seed": recipe.seed,
        "prompt_format": recipe.prompt_format,
    }


def train_on_traces(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], recipe: Any
) -> Iterator[SupervisedStep]:
    """The supervised steps that a recipe asks for, on the rows that have a completion; as ``train_supervised``."""
    if not any(row.get("completion") for row in rows):
        raise ValueError(f"sft_steps is {recipe.sft_steps}, but no row of {recipe.dataset_name!r} has a completion")
    return train_supervised(model, tokenizer, rows, **supervised_options(recipe))


def supervised_options(recipe: Any) -> dict[str, Any]:
    """The arguments of ``supervised.train_supervised`` and ``distill``."""
    return {
        "steps": recipe.sft_steps,
        "batch_size": recipe.sft_batch_size,
        "learning_rate": recipe.sft_learning_rate,
        "accumulation_steps": recipe.gradient_accumulation_steps,
        "seed": recipe.seed,
        "prompt_format": recipe.prompt_format,
    }


def fitting_rows(task: Task, rows: Sequence[Row], recipe: Any, *, sampler: Sampler, **options: Any) -> list[Row]:
    """The rows whose prompt fits beside a completion into the sampler's context."""
    return rows_that_fit(
        rows,
        task.tokenizer,
        recipe.prompt_format,
        max_completion_length=recipe.max_completion_length,
        max_prompt_length=recipe.max_prompt_length,
        context_length=sampler.context_length,
        **options,
    )


def held_out_rows(task: Task, recipe: Any, sampler: Sampler) -> list[Row]:
    """The held-out rows that fit, of which one must be left; none where there are none."""
    return fitting_rows(task, task.eval_rows, recipe, sampler=sampler, what="held-out") if task.eval_rows else []


def _load_splits(recipe: Any) -> tuple[list[Row], list[Row]]:
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
        "seed": recipe.seed,
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
    held_out_keys = {prompt_key(row) for row in eval_rows}
    return [row for row in rows[count:] if prompt_key(row) not in held_out_keys], eval_rows
