"""The built-in tasks, by the name that a recipe gives as ``dataset_name``."""

from __future__ import annotations

from grpo_kernels.training.tasks.addition import Addition, MixedAddition
from grpo_kernels.training.tasks.base import Goal, Problem, Row, SyntheticTask, build_model, step_boundaries
from grpo_kernels.training.tasks.comparison import Comparison
from grpo_kernels.training.tasks.logic import Logic
from grpo_kernels.training.tasks.subtraction import Subtraction

__all__ = ["TASKS", "Goal", "Problem", "Row", "SyntheticTask", "build_model", "get_task", "step_boundaries"]

TASKS: dict[str, SyntheticTask] = {
    task.name: task for task in (Addition(), MixedAddition(), Subtraction(), Comparison(), Logic())
}


def get_task(name: str) -> SyntheticTask:
    """The built-in task of that name.

    Raises:
        ValueError: There is none; the message lists those that are built in.
    """
    if name not in TASKS:
        raise ValueError(f"name must be one of the built-in tasks {', '.join(TASKS)}, got {name!r}")
    return TASKS[name]
