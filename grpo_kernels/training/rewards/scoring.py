"""How the loop calls reward functions, checks what they return, and adds it up."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import math
import numbers
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from grpo_kernels.ops.tokens.reference import weighted_sum

_NOT_COLUMNS = ("prompt", "completion")  # given under names of their own

RewardFunction = Callable[..., "list[float | None] | Awaitable[list[float | None]]"]


def score(
    functions: dict[str, RewardFunction],
    prompts: Sequence[Any],
    completions: Sequence[str],
    columns: dict[str, list[Any]],
) -> Tensor:  # [B, K]
    """The rewards of B completions under K functions, NaN where a function abstained with None.

    Synchronous functions run in turn, in this thread. Asynchronous ones run after them, together; where an event loop
    already runs in this thread, they get one of their own in another thread.

    Args:
        functions: By the name under which metrics and errors show them.
        prompts: One per completion, as in the dataset.
        completions: Decoded text.
        columns: The dataset's other columns, one value per completion.

    Raises:
        RuntimeError: A function raised; its exception is the cause.
        TypeError: A function returned something else than a list of numbers and None.
        ValueError: A function returned NaN, an infinite reward or not one reward per completion.
    """
    results: dict[str, Any] = {}
    awaitables: dict[str, Awaitable[Any]] = {}
    try:
        for name, function in functions.items():
            try:
                result = function(prompts, completions, **columns)
            except Exception as error:
                raise _failure(name, len(completions), error) from error
            (awaitables if inspect.isawaitable(result) else results)[name] = result
        if awaitables:
            results |= _await_together(awaitables, len(completions))
    finally:
        for awaitable in awaitables.values():
            if inspect.iscoroutine(awaitable):
                awaitable.close()  # of one that ran this does nothing; the others would warn that nobody awaited them
    rewards = torch.empty(len(completions), len(functions), dtype=torch.float32)
    for k, name in enumerate(functions):
        rewards[:, k] = _checked(name, results[name], len(completions))
    return rewards


def total(rewards: Tensor, weights: Sequence[float] | None) -> Tensor:  # [B, K] -> [B]
    """The weighted sum over functions, without those that abstained; NaN where all did."""
    factors = [1.0] * rewards.shape[1] if weights is None else list(weights)
    return weighted_sum(rewards, torch.tensor(factors, dtype=rewards.dtype), rewards.isnan())


def _await_together(awaitables: dict[str, Awaitable[Any]], count: int) -> dict[str, Any]:
    async def one(name: str, awaitable: Awaitable[Any]) -> Any:
        try:
            return await awaitable
        except Exception as error:
            raise _failure(name, count, error) from error

    async def together() -> list[Any]:
        return await asyncio.gather(*(one(name, awaitable) for name, awaitable in awaitables.items()))

    if _loop_runs_here():
        with ThreadPoolExecutor(max_workers=1) as pool:
            values = pool.submit(contextvars.copy_context().run, lambda: asyncio.run(together())).result()
    else:
        values = asyncio.run(together())
    return dict(zip(awaitables, values, strict=True))


def _loop_runs_here() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _failure(name: str, count: int, error: Exception) -> RuntimeError:
    return RuntimeError(f"reward function {name!r} failed on {count} completions: {type(error).__name__}: {error}")


def _checked(name: str, values: Any, count: int) -> Tensor:  # [B]
    if hasattr(values, "tolist"):  # a tensor or an array
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise TypeError(f"reward function {name!r} must return a list of rewards, got {type(values).__name__}")
    if len(values) != count:
        raise ValueError(f"reward function {name!r} must return {count} rewards, got {len(values)}")
    rewards = torch.tensor([_number(name, i, value) for i, value in enumerate(values)], dtype=torch.float32)
    for i in rewards.isinf().nonzero().flatten().tolist():  # also what is finite in Python and not in fp32
        raise ValueError(f"reward function {name!r} must return finite rewards, got {values[i]} for completion {i}")
    return rewards


def _number(name: str, index: int, value: Any) -> float:
    if value is None:
        return math.nan
    if hasattr(value, "tolist"):  # a scalar of numpy or torch
        value = value.tolist()
    if not isinstance(value, numbers.Real):
        raise TypeError(
            f"reward function {name!r} must return numbers or None, got {type(value).__name__} {value!r} "
            f"for completion {index}"
        )
    try:
        number = float(value)
    except OverflowError:  # an integer beyond the floats
        number = math.inf
    if math.isnan(number):
        raise ValueError(
            f"reward function {name!r} must return finite rewards, got nan for completion {index}; None abstains"
        )
    return number


def columns_of(rows: Sequence[dict[str, Any]], completion_ids: list[list[int]]) -> dict[str, list[Any]]:
    """What reward functions are given beside prompts and completions: the rows' other columns, and the tokens.

    A column that one row has is there for all, with None where a row lacks it.
    """
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in _NOT_COLUMNS]
    columns = {name: [row.get(name) for row in rows] for name in names}
    return columns | {"completion_ids": completion_ids}
