"""Reward functions, ``f(prompts, completions, **columns) -> list[float | None]``, and how the loop calls them."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

RewardFunction = Callable[..., "list[float | None]"]

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_FORMAT = re.compile(
    r"\s*<think>((?!</?think>|</?answer>).)*</think>\s*<answer>((?!</?think>|</?answer>).)*</answer>\s*", re.DOTALL
)


def extract_answer(completion: str) -> str | None:
    """The text of the last ``<answer>`` element without its white space, or None if there is none."""
    answers = _ANSWER.findall(completion)
    return "".join(answers[-1].split()) if answers else None


def accuracy_reward(
    prompts: Sequence[Any], completions: Sequence[str], *, answer: Sequence[Any], **columns: Any
) -> list[float]:
    """1 where the completion's answer equals the ``answer`` column up to white space, else 0."""
    expected = ["".join(str(a).split()) for a in answer]
    return [float(extract_answer(c) == e) for c, e in zip(completions, expected, strict=True)]


def format_reward(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """1 where the completion is one ``<think>`` element and one ``<answer>`` element and nothing else, else 0."""
    return [float(_FORMAT.fullmatch(c) is not None) for c in completions]


BUILT_IN: dict[str, RewardFunction] = {"accuracy": accuracy_reward, "format": format_reward}


def resolve(name: str) -> RewardFunction:
    """A reward function by its built-in name or as ``module:function``.

    Raises:
        ValueError: There is no such function.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    module_name, _, function_name = name.partition(":")
    if not function_name:
        raise ValueError(f'reward_funcs: expected one of {", ".join(BUILT_IN)} or "module:function", got {name!r}')
    function = getattr(importlib.import_module(module_name), function_name, None)
    if not callable(function):
        raise ValueError(f"reward_funcs: module {module_name!r} has no function {function_name!r}")
    return function


def score(
    functions: dict[str, RewardFunction],
    prompts: Sequence[Any],
    completions: Sequence[str],
    columns: dict[str, list[Any]],
) -> Tensor:  # [B, K]
    """The rewards of B completions under K functions, NaN where a function abstained with None.

    Args:
        functions: By the name under which metrics and errors show them.
        prompts: One per completion, as in the dataset.
        completions: Decoded text.
        columns: The dataset's other columns, one value per completion.

    Raises:
        ValueError: A function returned an infinite reward or not one reward per completion.
    """
    rewards = torch.empty(len(completions), len(functions), dtype=torch.float32)
    for k, (name, function) in enumerate(functions.items()):
        values = function(prompts, completions, **columns)
        if len(values) != len(completions):
            raise ValueError(f"reward function {name!r} must return {len(completions)} rewards, got {len(values)}")
        for i, value in enumerate(values):
            if value is not None and math.isinf(value):
                raise ValueError(f"reward function {name!r} must return finite rewards, got {value} for completion {i}")
        rewards[:, k] = torch.tensor([math.nan if v is None else v for v in values])
    return rewards


def total(rewards: Tensor, weights: Sequence[float] | None) -> Tensor:  # [B, K] -> [B]
    """The weighted sum over functions, without those that abstained; NaN where all did."""
    weighted = rewards if weights is None else rewards * torch.tensor(weights, dtype=rewards.dtype)
    return torch.where(rewards.isnan().all(dim=1), math.nan, weighted.nansum(dim=1))
