"""Reward functions by name, and the checks of their parameters."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import math
import re
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from grpo_kernels.errors import ThirdPartyError, third_party_error

RewardFunction = Callable[..., "list[float | None] | Awaitable[list[float | None]]"]

#: The functions, and the classes that make one of their parameters. A module is imported when one of its names is used.
BUILT_IN = {
    "accuracy": "grpo_kernels.rewards.answers:accuracy_reward",
    "math_accuracy": "grpo_kernels.rewards.answers:math_accuracy_reward",
    "exact_match": "grpo_kernels.rewards.answers:exact_match_reward",
    "format": "grpo_kernels.rewards.text:format_reward",
    "tag_count": "grpo_kernels.rewards.text:tag_count_reward",
    "language_consistency": "grpo_kernels.rewards.language:LanguageConsistencyReward",
    "length": "grpo_kernels.rewards.length:LengthReward",
    "cosine_length": "grpo_kernels.rewards.length:CosineLengthReward",
    "overlong": "grpo_kernels.rewards.length:OverlongReward",
    "repetition": "grpo_kernels.rewards.text:RepetitionReward",
    "code": "grpo_kernels.rewards.code:CodeReward",
    "reasoning_gym": "grpo_kernels.rewards.reasoning_gym:reasoning_gym_reward",
}

_CALL = re.compile(r"([\w.:]+)\((.*)\)", re.DOTALL)
_MODULE = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*")
_FACTORIES: list[Callable[..., Any]] = []
_FOLDERS: list[Path] = []  # where modules are looked for beside the installed packages
_Factory = TypeVar("_Factory", bound=Callable[..., Any])


def reward_factory(factory: _Factory) -> _Factory:
    """Marks a class or function of a module of one's own as one that ``resolve`` may call with a name's parameters."""
    _FACTORIES.append(factory)
    return factory


def look_in(folder: Path) -> None:
    """Has ``module:function`` looked for in a folder, after the installed packages and folders before it."""
    folder = folder.resolve()
    if folder not in _FOLDERS:
        _FOLDERS.append(folder)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def check_name(check: str | None, reward_funcs: Sequence[str]) -> str:
    """The name of the reward function that says which answers are right: ``check``, if it is there.

    Else the first of ``reward_funcs`` that judges answers or programs, else the first of one's own, else "accuracy".
    """
    if check is not None:
        return check
    from grpo_kernels.rewards.answers import JUDGES

    judges = [name for name in reward_funcs if name.partition("(")[0].strip() in (*JUDGES, "code", "reasoning_gym")]
    own = [name for name in reward_funcs if ":" in name.partition("(")[0]]
    return (judges + own + ["accuracy"])[0]


def resolve(name: str, *, key: str = "reward_funcs") -> RewardFunction:
    """A reward function by its built-in name, as ``module:function``, or a reward model by its folder or Hub name.

    The first two may be followed by parameters, ``repetition(n=3, max_penalty=-1.0)``, whose values are Python
    literals; of a module, what is called with them must be marked by ``reward_factory``. Nothing else is called here,
    but a module that is named is imported: it is code that runs. Messages begin with ``key``, where the name stands.

    Raises:
        ValueError: There is no such module or function, what has parameters is not marked, it has no such parameter,
            or a value is no literal or out of range.
        ThirdPartyError: The module was found and raised when it was imported.
    """
    try:
        return _resolve(name)
    except (ValueError, ThirdPartyError) as error:
        raise type(error)(f"{key}: {error}") from error.__cause__


def import_function(name: str) -> Callable[..., Any]:
    """The function or class that ``module:function`` names, not called; errors are those of ``resolve``."""
    module_name, _, function_name = name.partition(":")
    module_name = module_name.removesuffix(".py")
    if not _MODULE.fullmatch(module_name):
        raise ValueError(f'"module:function" names a module, as my_rewards:right, got {name!r}')
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        if not isinstance(error, ModuleNotFoundError) or not f"{module_name}.".startswith(f"{error.name}."):
            raise third_party_error(f"{name!r} cannot be imported", error) from error
        places = "".join(f" or in {folder}" for folder in _FOLDERS)
        raise ValueError(f"{name!r} cannot be imported: {error} among the installed packages{places}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"module {module_name!r} ({module.__file__}) has no function {function_name!r}")
    return function


def check_integer(name: str, value: Any, minimum: int) -> None:
    """Raises ValueError, naming the parameter, unless ``value`` is an integer of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")


def check_number(name: str, value: Any, *, low: float = -math.inf, high: float = math.inf) -> None:
    """Raises ValueError, naming the parameter, unless ``value`` is a finite number from ``low`` to ``high``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {value!r}")


def check_option(name: str, value: Any, options: Sequence[str]) -> None:
    """Raises ValueError, naming the parameter, unless ``value`` is one of the options."""
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}, got {value!r}")


def _resolve(name: str) -> RewardFunction:
    base, arguments = _parse(name)
    is_own = base.partition(":")[2] != ""
    if base not in BUILT_IN and not is_own:
        if arguments is None and ("/" in base or (base and Path(base).expanduser().is_dir())):
            from grpo_kernels.rewards.reward_model import RewardModel

            return RewardModel(base)
        near = difflib.get_close_matches(base, BUILT_IN, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f'expected one of {", ".join(BUILT_IN)} or "module:function", got {base!r}{hint} (a reward '
            "model is named by its folder or as owner/model)"
        )
    function = import_function(BUILT_IN.get(base, base))
    is_class = isinstance(function, type)
    if arguments is None and not is_class:
        return function
    if base in BUILT_IN and not is_class:
        raise ValueError(f"{base!r} has no parameters, got {name!r}")
    is_built_in = is_class and f"{function.__module__}:{function.__name__}" in BUILT_IN.values()
    if not is_built_in and not any(function is factory for factory in _FACTORIES):
        raise ValueError(
            f"{base!r} must be marked by @reward_factory to be called for {name!r}; what is not "
            "yours can be made in a module of your own, and be named as module:what_was_made"
        )
    reward = _call_factory(base, function, arguments or {})
    if not callable(reward):
        raise ValueError(f"{name!r} must make a reward function, got {type(reward).__name__}")
    return reward


def _parse(name: str) -> tuple[str, dict[str, Any] | None]:
    """The name before the parentheses and the parameters in them, None without parentheses."""
    match = _CALL.fullmatch(name.strip())
    if match is None:
        return name, None
    try:
        call = ast.parse(f"f({match[2]})", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError("not one list of key=value")
        arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        if None in arguments or len(arguments) < len(call.keywords):
            raise ValueError("a key is missing or there twice")
        return match[1], arguments
    except (SyntaxError, ValueError) as error:
        raise ValueError(f'expected "name(key=value, ...)" with literal values, got {name!r}: {error}') from error


def _call_factory(name: str, factory: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    parameters = inspect.signature(factory).parameters.values()
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    unknown = [key for key in arguments if key not in named]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise ValueError(f"{name!r} has no parameter {unknown[0]!r}; it has {', '.join(named) or 'none'}")
    missing = [key for key, p in named.items() if p.default is p.empty and key not in arguments]
    if missing:
        raise ValueError(f'{name!r} needs {", ".join(missing)}, as in "{name}({missing[0]}=...)"')
    try:
        return factory(**arguments)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from error
