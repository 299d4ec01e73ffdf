"""How the loop calls reward functions, checks what they return, and adds it up."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import math
import numbers
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerState

from grpo_kernels.errors import ThirdPartyError, ThirdPartyTypeError, third_party_error
from grpo_kernels.ops.tokens.reference import weighted_sum
from grpo_kernels.rewards.reward_model import RewardModel

_NOT_COLUMNS = ("prompt", "completion")  # given under names of their own
#: What a function is given beside a dataset's columns; a column of such a name gives way.
ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
RESERVED_METRICS = ("step", "loss", "reward", "reward_std", "grad_norm", "learning_rate", "step_time", "num_tokens")

RewardFunction = Callable[..., "list[float | None] | Awaitable[list[float | None]]"]


class RewardLog:
    """What reward functions report beside rewards, by TRL's ``log_metric`` and ``log_extra``.

    Args:
        step: Optimizer steps so far.
        max_steps: Of the run.
    """

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
        self.columns[column].extend(_simple(value) for value in _simple(values))

    def rows(self, count: int) -> list[dict[str, Any]]:
        """The extra columns of each of ``count`` completions.

        Raises:
            ValueError: A column has not one value per completion.
        """
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

    A function is called as TRL calls it, by keyword: ``f(prompts=..., completions=..., completion_ids=..., **columns)``
    with ``trainer_state``, ``log_metric`` and ``log_extra``. One that takes no ``**kwargs`` is given what it names. A
    completion is a string, or ``[{"role": "assistant", "content": ...}]`` where its prompt is a list of messages.

    Synchronous functions run in turn, in this thread. Asynchronous ones run after them, together; where an event loop
    already runs in this thread, they get one of their own in another thread.

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
    texts = zip(prompts, completions, strict=True)
    messages = [
        [{"role": "assistant", "content": c}] if isinstance(c, str) and not isinstance(p, str) else c for p, c in texts
    ]
    arguments = {"prompts": list(prompts), "completions": messages, **(log or RewardLog()).arguments(), **columns}
    results: dict[str, Any] = {}
    awaitables: dict[str, Awaitable[Any]] = {}
    try:
        for name, function in functions.items():
            result = _called(name, function, arguments)
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


def _simple(value: Any) -> Any:
    """What JSON can hold: a tensor or an array as numbers, and anything that it has no form for as text."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [_simple(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float, bool, dict)) else str(value)


def _called(name: str, function: RewardFunction | nn.Module, arguments: dict[str, Any]) -> Any:
    if isinstance(function, nn.Module):
        function = RewardModel(function)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin may have none
        signature = None
    try:
        if signature is None:
            return function(**arguments)
        kinds = [parameter.kind for parameter in signature.parameters.values()]
        taken = arguments
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            taken = {key: value for key, value in arguments.items() if key in signature.parameters}
        _check_takes(signature, taken, arguments)
        return function(**taken)
    except Exception as error:
        raise _failure(name, len(arguments["completions"]), error) from error


def _check_takes(signature: inspect.Signature, taken: dict[str, Any], arguments: dict[str, Any]) -> None:
    try:
        signature.bind(**taken)
    except TypeError as error:
        names = ", ".join(arguments)
        raise TypeError(f"{error}; it is called by keyword, with {names}, and takes {signature}") from None


def _failure(name: str, count: int, error: Exception) -> ThirdPartyError:
    return third_party_error(f"reward function {name!r} failed on {count} completions", error)


def _checked(name: str, values: Any, count: int) -> Tensor:  # [B]
    if hasattr(values, "tolist"):  # a tensor or an array
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise ThirdPartyTypeError(
            f"reward function {name!r} must return a list of rewards, got {type(values).__name__}"
        )
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
        raise ThirdPartyTypeError(
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
    columns = {name: [row.get(name) for row in rows] for name in names if name not in ARGUMENTS}
    return columns | {"completion_ids": completion_ids}
