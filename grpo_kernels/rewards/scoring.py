"""How reward functions are called, checked in what they return, and added up."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import math
import numbers
from collections import defaultdict
from collections.abc import Awaitable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerState

from grpo_kernels.errors import ThirdPartyError, ThirdPartyTypeError, third_party_error
from grpo_kernels.ops.tokens.reference import weighted_sum
from grpo_kernels.rewards.registry import RewardFunction

#: What a function is given beside a dataset's columns; a column of such a name gives way.
ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
RESERVED_METRICS = ("step", "loss", "reward", "reward_std", "grad_norm", "learning_rate", "step_time", "num_tokens")


class RewardLog:
    """What reward functions report beside rewards, by TRL's ``log_metric`` and ``log_extra``, at one step of a run."""

    def __init__(self, step: int = 0, max_steps: int = 0) -> None:
        self.state = TrainerState(global_step=step, max_steps=max_steps)
        self.metrics: dict[str, list[float]] = defaultdict(list)
        self.columns: dict[str, list[Any]] = defaultdict(list)  # one value per completion

    def log_metric(self, name: str, value: float) -> None:
        """Adds to the mean that is reported under this name."""
        if name in RESERVED_METRICS:
            raise ValueError(f"log_metric({name!r}, ...): a metric of the trainer's own has this name")
        self.metrics[name].append(float(value))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Adds a column to the samples, one value per completion."""
        self.columns[column].extend(_to_json(value) for value in _to_json(values))

    def rows(self, count: int) -> list[dict[str, Any]]:
        """The extra columns of each of ``count`` completions; raises ValueError where one has not as many values."""
        for name, values in self.columns.items():
            if len(values) != count:
                raise ValueError(f"log_extra({name!r}, ...) must have {count} values, got {len(values)}")
        return [{name: values[i] for name, values in self.columns.items()} for i in range(count)]

    def arguments(self) -> dict[str, Any]:
        """What reward functions are given."""
        return {"trainer_state": self.state, "log_extra": self.log_extra, "log_metric": self.log_metric}


def score(
    functions: Mapping[str, RewardFunction | nn.Module],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    log: RewardLog | None = None,
) -> Tensor:  # [B, K]
    """The rewards of B completions under K functions, NaN where a function abstained with None.

    A function is called by keyword, as ``grpo_kernels.rewards`` says; one that takes no ``**kwargs`` is given what it
    names. Synchronous functions run in turn, in this thread. Asynchronous ones run after them, all at once; where an
    event loop already runs in this thread, they get one of their own in another thread.

    Args:
        functions: By the name under which metrics and errors show them. A module is a reward model.
        prompts: One per completion, as in the dataset.
        completions: Decoded text, or messages already.
        columns: The dataset's other columns, one value per completion, and ``completion_ids``.
        log: What the functions report; by default it goes nowhere.

    Raises:
        ThirdPartyError: A function raised; its exception is the cause.
        TypeError: A function returned something else than a list of numbers and None.
        ValueError: A function returned NaN, an infinite reward or not one reward per completion.
    """
    messages = [
        [{"role": "assistant", "content": c}] if isinstance(c, str) and not isinstance(p, str) else c
        for p, c in zip(prompts, completions, strict=True)
    ]
    arguments = {"prompts": list(prompts), "completions": messages, **(log or RewardLog()).arguments(), **columns}
    results: dict[str, Any] = {}
    awaitables: dict[str, Awaitable[Any]] = {}
    try:
        for name, function in functions.items():
            result = _call(name, function, arguments)
            (awaitables if inspect.isawaitable(result) else results)[name] = result
        if awaitables:
            results |= _await_all(awaitables, len(completions))
    finally:
        for awaitable in awaitables.values():
            if inspect.iscoroutine(awaitable):
                awaitable.close()  # of one that ran this does nothing; the others would warn that nobody awaited them
    rewards = [_reward_tensor(name, results[name], len(completions)) for name in functions]
    return torch.stack(rewards, dim=1) if rewards else torch.empty(len(completions), 0)


def total(rewards: Tensor, weights: Sequence[float] | None) -> Tensor:  # [B, K] -> [B]
    """The weighted sum over functions, without those that abstained; NaN where all did."""
    factors = [1.0] * rewards.shape[1] if weights is None else list(weights)
    return weighted_sum(rewards, torch.tensor(factors, dtype=rewards.dtype), rewards.isnan())


def columns_of(rows: Sequence[dict[str, Any]], completion_ids: list[list[int]]) -> dict[str, list[Any]]:
    """The rows' columns beside prompt and completion, with None where a row lacks one, and the tokens."""
    names = dict.fromkeys(name for row in rows for name in row if name not in ("prompt", "completion", *ARGUMENTS))
    return {name: [row.get(name) for row in rows] for name in names} | {"completion_ids": completion_ids}


def _await_all(awaitables: dict[str, Awaitable[Any]], count: int) -> dict[str, Any]:
    async def await_reward(name: str) -> Any:
        try:
            return await awaitables[name]
        except Exception as error:
            raise _failure(name, count, error) from error

    async def gather() -> list[Any]:
        return await asyncio.gather(*map(await_reward, awaitables))

    has_loop = False
    with contextlib.suppress(RuntimeError):  # none runs in this thread
        has_loop = asyncio.get_running_loop() is not None
    if has_loop:
        with ThreadPoolExecutor(max_workers=1) as pool:
            values = pool.submit(contextvars.copy_context().run, lambda: asyncio.run(gather())).result()
    else:
        values = asyncio.run(gather())
    return dict(zip(awaitables, values, strict=True))


def _to_json(value: Any) -> Any:
    """What JSON can hold: a tensor or an array as numbers, and anything that it has no form for as text."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float, bool, dict)) else str(value)


def _call(name: str, function: RewardFunction | nn.Module, arguments: dict[str, Any]) -> Any:
    if isinstance(function, nn.Module):
        from grpo_kernels.rewards.reward_model import RewardModel

        function = RewardModel(function)
    try:
        return function(**_accepted(function, arguments))
    except Exception as error:
        raise _failure(name, len(arguments["completions"]), error) from error


def _accepted(function: RewardFunction, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those arguments that a function names, or all if it takes any; raises TypeError where it needs others."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin may have none
        return arguments
    names = ", ".join(arguments)
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
        arguments = {key: value for key, value in arguments.items() if key in signature.parameters}
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise TypeError(f"{error}; it is called by keyword, with {names}, and takes {signature}") from None
    return arguments


def _failure(name: str, count: int, error: Exception) -> ThirdPartyError:
    return third_party_error(f"reward function {name!r} failed on {count} completions", error)


def _reward_tensor(name: str, values: Any, count: int) -> Tensor:  # [B]
    must = f"reward function {name!r} must return"
    if hasattr(values, "tolist"):  # a tensor or an array
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise ThirdPartyTypeError(f"{must} a list of rewards, got {type(values).__name__}")
    if len(values) != count:
        raise ValueError(f"{must} {count} rewards, got {len(values)}")
    values = [value.tolist() if hasattr(value, "tolist") else value for value in values]  # scalars of numpy or torch
    for i, value in enumerate(values):
        if value is not None and not isinstance(value, numbers.Real):
            raise ThirdPartyTypeError(
                f"{must} numbers or None, got {type(value).__name__} {value!r} for completion {i}"
            )
    # An integer may be beyond the floats.
    floats = [math.nan if value is None else float(max(min(value, 1e300), -1e300)) for value in values]
    rewards = torch.tensor(floats, dtype=torch.float32)
    for i in (~rewards.isfinite()).nonzero().flatten().tolist():  # also what is finite in Python and not in fp32
        if values[i] is not None:
            hint = "; None abstains" if rewards[i].isnan() else ""
            raise ValueError(f"{must} finite rewards, got {values[i]} for completion {i}{hint}")
    return rewards
