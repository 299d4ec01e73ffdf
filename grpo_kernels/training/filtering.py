"""Which problems and groups are worth training on: the pass-rate filter, and DAPO's dynamic sampling.

A group whose rewards are all equal has zero advantages, and so no gradient.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from grpo_kernels.files import replace_text
from grpo_kernels.ops.tokens.reference import all_equal
from grpo_kernels.rewards import total
from grpo_kernels.training.data import Task
from grpo_kernels.training.evaluation import evaluate_samples
from grpo_kernels.training.recipe import Recipe
from grpo_kernels.training.rollout import Rollout, joined
from grpo_kernels.training.sampling import context_length_of, rows_that_fit
from grpo_kernels.training.tasks import Row

PASS_RATES = "pass_rates.json"


class Scored(NamedTuple):
    """B completions of one process with their rewards, group after group."""

    rollout: Rollout
    rewards: Tensor  # [B, K], on the host
    prompts: list[str]  # as the model saw them
    completions: list[str]  # as the rewards did
    extras: list[dict[str, Any]]  # what reward functions logged of each
    metrics: dict[str, list[float]]  # and of them all

    def groups(self, indices: Tensor, num_generations: int) -> Scored:
        """The groups at ``indices``."""
        rows = (indices[:, None] * num_generations + torch.arange(num_generations)).flatten()
        lists = (self.prompts, self.completions, self.extras)
        prompts, completions, extras = ([values[i] for i in rows.tolist()] for values in lists)
        rollout = self.rollout.select(rows.to(self.rollout.completion_ids.device))
        return Scored(rollout, self.rewards[rows], prompts, completions, extras, self.metrics)


def together(parts: Sequence[Scored]) -> Scored:
    """All of them in one."""
    if len(parts) == 1:
        return parts[0]
    prompts, completions, extras = ([value for part in parts for value in part[k]] for k in (2, 3, 4))
    names = dict.fromkeys(name for part in parts for name in part.metrics)
    metrics = {name: [value for part in parts for value in part.metrics.get(name, ())] for name in names}
    rewards = torch.cat([part.rewards for part in parts])
    return Scored(joined([part.rollout for part in parts]), rewards, prompts, completions, extras, metrics)


def filtered_task(task: Task, recipe: Recipe, accelerator: Accelerator, folder: Path, *, known: bool) -> Task:
    """The task with the training rows whose pass rate lies between ``min_pass_rate`` and ``max_pass_rate``.

    A rate is the share of right answers among ``pass_rate_samples`` at temperature 1, by the model as it is. The rates
    are kept in ``pass_rates.json``, so that a run that is resumed, with another model, has the same rows. Every
    process calls it and tries its share of the rows.

    Args:
        task: Its model has whole parameters.
        recipe: Without bounds the task is returned as it is.
        accelerator: Of the processes.
        folder: Of the run.
        known: Take the rates from ``folder``.

    Raises:
        ValueError: Too few rows are left for a generation, or the kept rates cannot be read or are of other rows.
    """
    low, high = recipe.pass_rate_bounds
    if recipe.min_pass_rate is None and recipe.max_pass_rate is None:
        return task
    fitting = rows_that_fit(task.train_rows, task.tokenizer, recipe, context_length_of(task.model))
    task = task._replace(train_rows=fitting)
    rates = _read_rates(folder / PASS_RATES) if known else _measured_rates(task, recipe, accelerator)
    if not known and accelerator.is_main_process:
        replace_text(folder / PASS_RATES, json.dumps(rates))
    rows = pass_rate_filter(task.train_rows, rates, low, high)
    accelerator.print(
        f"pass-rate filter: {len(rows)} of {len(rates)} training problems are left, {sum(r <= low for r in rates)} "
        f"were too hard and {sum(r >= high for r in rates)} too easy"
    )
    if len(rows) < recipe.prompts_per_generation:
        raise ValueError(
            f"at least {recipe.prompts_per_generation} training problems (one generation's) must have a pass rate "
            f"between min_pass_rate={recipe.min_pass_rate} and max_pass_rate={recipe.max_pass_rate}, got {len(rows)}"
        )
    return task._replace(train_rows=rows)


def _measured_rates(task: Task, recipe: Recipe, accelerator: Accelerator) -> list[float]:
    count, rank = accelerator.num_processes, accelerator.process_index
    mine = list(enumerate(task.train_rows))[rank::count]
    asked = replace(recipe, eval_samples=recipe.pass_rate_samples)
    own = []
    if mine:
        report = evaluate_samples(task.model, task.tokenizer, [row for _, row in mine], asked, ks=(1,))
        own = [[i, rate] for (i, _), rate in zip(mine, report.pass_rates, strict=True)]
    return [rate for _, rate in sorted(own if count == 1 else gather_object(own))]


def _read_rates(path: Path) -> list[float]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read, which says what rows the run has: {error}") from error


def pass_rate_filter(rows: Sequence[Row], rates: Sequence[float], low: float = 0.0, high: float = 1.0) -> list[Row]:
    """The rows whose pass rate lies strictly between two bounds.

    With the bounds 0 and 1 it drops the problems that the model always or never solves.

    Args:
        rows: P problems.
        rates: The share of right answers to each, between 0 and 1.
        low: A row must have more.
        high: A row must have less.

    Raises:
        ValueError: There is not one rate per row, a rate is not between 0 and 1, or ``low`` is not below ``high``.

    Example:
        >>> pass_rate_filter([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}], [0.0, 0.25, 1.0])
        [{'prompt': 'b'}]
    """
    if len(rates) != len(rows):
        raise ValueError(f"rates must have one rate per row ({len(rows)}), got {len(rates)}")
    if not low < high:
        raise ValueError(f"low must be less than high, got {low} and {high}")
    for i, rate in enumerate(rates):
        if not 0 <= rate <= 1:
            raise ValueError(f"rates must be between 0 and 1, got {rate} for row {i}")
    return [row for row, rate in zip(rows, rates, strict=True) if low < rate < high]


def informative_groups(
    rewards: Tensor,  # [B]
    num_generations: int,
) -> Tensor:  # [B // num_generations], bool
    """Which groups have rewards that differ, and so a gradient: DAPO eq. 11 (arXiv:2503.14476).

    Dynamic sampling keeps these and samples further prompts until a batch is full of them.

    Args:
        rewards: One per completion, group after group. NaN, where no function scored, counts for nothing.
        num_generations: Completions in a group.

    Raises:
        TypeError: The rewards are not floating point.
        ValueError: They are not one per completion of whole groups.

    Example:
        >>> informative_groups(torch.tensor([1.0, 1.0, 0.0, 1.0]), 2)
        tensor([False,  True])
    """
    if not rewards.is_floating_point():
        raise TypeError(f"rewards must be floating point, got {rewards.dtype}")
    if num_generations < 1 or rewards.dim() != 1 or len(rewards) % num_generations:
        raise ValueError(
            f"rewards must have shape [B], B a multiple of num_generations ({num_generations}), "
            f"got {list(rewards.shape)}"
        )
    return ~all_equal(rewards.reshape(-1, num_generations))[:, 0]


def differing_groups(
    rewards: Tensor,  # [B, K]
    num_generations: int,
    weights: Sequence[float] | None,
    aggregation: str,
) -> Tensor:  # [B // num_generations], bool
    """Which groups have rewards that differ in what advantages are made of: the one definition of a group that teaches.

    That is the weighted sum, or with "normalize_then_sum" any function that has a weight. See ``informative_groups``.

    Args:
        rewards: Of K functions, NaN where one abstained, group after group.
        num_generations: Completions in a group.
        weights: Of the functions; None means 1.
        aggregation: TRL's ``multi_objective_aggregation``.
    """
    if aggregation == "sum_then_normalize":
        return informative_groups(total(rewards, weights), num_generations)
    counts = rewards if weights is None else rewards * (torch.tensor(weights, device=rewards.device) != 0)
    return torch.stack([informative_groups(column, num_generations) for column in counts.unbind(dim=1)]).any(dim=0)
