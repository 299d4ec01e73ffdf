"""Reward functions by name."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any, TypeVar

from grpo_kernels.training.rewards.answers import accuracy_reward, exact_match_reward, math_accuracy_reward
from grpo_kernels.training.rewards.code import CodeReward
from grpo_kernels.training.rewards.language import LanguageConsistencyReward
from grpo_kernels.training.rewards.length import CosineLengthReward, LengthReward, OverlongReward
from grpo_kernels.training.rewards.scoring import RewardFunction
from grpo_kernels.training.rewards.text import RepetitionReward, format_reward, tag_count_reward

# A class makes reward functions of its parameters; a function is one.
BUILT_IN: dict[str, RewardFunction] = {
    "accuracy": accuracy_reward,
    "math_accuracy": math_accuracy_reward,
    "exact_match": exact_match_reward,
    "format": format_reward,
    "tag_count": tag_count_reward,
    "language_consistency": LanguageConsistencyReward,
    "length": LengthReward,
    "cosine_length": CosineLengthReward,
    "overlong": OverlongReward,
    "repetition": RepetitionReward,
    "code": CodeReward,
}

_CALL = re.compile(r"([\w.:]+)\((.*)\)", re.DOTALL)
_FACTORIES: list[Callable[..., Any]] = [made for made in BUILT_IN.values() if isinstance(made, type)]
_Factory = TypeVar("_Factory", bound=Callable[..., Any])


def reward_factory(factory: _Factory) -> _Factory:
    """Marks a class or function of a module of one's own as one that ``resolve`` may call with a name's parameters."""
    _FACTORIES.append(factory)
    return factory


def resolve(name: str) -> RewardFunction:
    """A reward function by its built-in name or as ``module:function``.

    Both may be followed by parameters, ``repetition(n=3, max_penalty=-1.0)``, whose values are Python literals; of a
    module, what is called with them is a class or function that makes the reward function, marked by
    ``reward_factory``. Nothing else is called here, but a module that is named is imported: it is code that runs.

    Raises:
        ValueError: There is no such module or function, what has parameters is not marked, it has no such parameter,
            or a value is no literal or out of range.
    """
    base, arguments = _split(name)
    if base in BUILT_IN:
        function = BUILT_IN[base]
        if arguments is not None and not isinstance(function, type):
            raise ValueError(f"reward_funcs: {base!r} has no parameters, got {name!r}")
    else:
        function = _imported(base)
    if arguments is None and not isinstance(function, type):
        return function
    if not any(function is known for known in _FACTORIES):
        raise ValueError(f"reward_funcs: {base!r} must be marked by @reward_factory to be called for {name!r}")
    made = _made(base, function, arguments or {})
    if not callable(made):
        raise ValueError(f"reward_funcs: {name!r} must make a reward function, got {type(made).__name__}")
    return made


def _split(name: str) -> tuple[str, dict[str, Any] | None]:
    """The name before the parentheses and the parameters in them, None without parentheses."""
    match = _CALL.fullmatch(name.strip())
    if match is None:
        return name, None
    try:
        call = ast.parse(f"f({match[2]})", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError("not one list of key=value")
        keys = [keyword.arg for keyword in call.keywords]
        if None in keys or len(set(keys)) < len(keys):
            raise ValueError("a key is missing or there twice")
        return match[1], {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f'reward_funcs: expected "name(key=value, ...)" with literal values, got {name!r}: {error}'
        ) from error


def _imported(name: str) -> Callable[..., Any]:
    module_name, _, function_name = name.partition(":")
    if not function_name:
        raise ValueError(f'reward_funcs: expected one of {", ".join(BUILT_IN)} or "module:function", got {name!r}')
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"reward_funcs: {name!r} cannot be imported: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"reward_funcs: module {module_name!r} has no function {function_name!r}")
    return function


def _made(name: str, factory: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    signature = inspect.signature(factory)
    known = [p.name for p in signature.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    for key in arguments:
        if key not in known and not takes_any:
            raise ValueError(f"reward_funcs: {name!r} has no parameter {key!r}; it has {', '.join(known) or 'none'}")
    missing = [
        key for key in known if key not in arguments and signature.parameters[key].default is inspect.Parameter.empty
    ]
    if missing:
        raise ValueError(f'reward_funcs: {name!r} needs {", ".join(missing)}, as in "{name}({missing[0]}=...)"')
    try:
        return factory(**arguments)
    except ValueError as error:
        raise ValueError(f"reward_funcs: {name!r}: {error}") from error
