"""Reward functions by name."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from grpo_kernels.errors import ThirdPartyError, third_party_error
from grpo_kernels.rewards.answers import JUDGES, accuracy_reward, exact_match_reward, math_accuracy_reward
from grpo_kernels.rewards.code import CodeReward
from grpo_kernels.rewards.language import LanguageConsistencyReward
from grpo_kernels.rewards.length import CosineLengthReward, LengthReward, OverlongReward
from grpo_kernels.rewards.reward_model import RewardModel
from grpo_kernels.rewards.scoring import RewardFunction
from grpo_kernels.rewards.text import RepetitionReward, format_reward, tag_count_reward

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
    """The name of the reward function that says which answers are right.

    That is ``check``, or else the first of ``reward_funcs`` that judges answers or programs, else the first that is
    one's own, else "accuracy".
    """
    if check is not None:
        return check
    bases = {name: name.partition("(")[0].strip() for name in reward_funcs}
    judging = [name for name, base in bases.items() if base in (*JUDGES, "code")]
    own = [name for name, base in bases.items() if ":" in base]
    return (judging + own + ["accuracy"])[0]


def resolve(name: str, *, key: str = "reward_funcs") -> RewardFunction:
    """A reward function by its built-in name, as ``module:function``, or a reward model by its folder or Hub name.

    The first two may be followed by parameters, ``repetition(n=3, max_penalty=-1.0)``, whose values are Python
    literals; of a module, what is called with them is a class or function that makes the reward function, marked by
    ``reward_factory``. Nothing else is called here, but a module that is named is imported: it is code that runs.

    Args:
        name: As above.
        key: Where the name stands, for messages.

    Raises:
        ValueError: There is no such module or function, what has parameters is not marked, it has no such parameter,
            or a value is no literal or out of range.
        ThirdPartyError: The module was found and raised when it was imported.
    """
    try:
        return _resolved(name)
    except (ValueError, ThirdPartyError) as error:
        raise type(error)(f"{key}: {error}") from error.__cause__


def _resolved(name: str) -> RewardFunction:
    base, arguments = _split(name)
    is_path = "/" in base or (base != "" and Path(base).expanduser().is_dir())
    if base not in BUILT_IN and ":" not in base and arguments is None and is_path:
        return RewardModel(base)
    if base in BUILT_IN:
        function = BUILT_IN[base]
        if arguments is not None and not isinstance(function, type):
            raise ValueError(f"{base!r} has no parameters, got {name!r}")
    else:
        function = _imported(base)
    if arguments is None and not isinstance(function, type):
        return function
    if not any(function is known for known in _FACTORIES):
        raise ValueError(
            f"{base!r} must be marked by @reward_factory to be called for {name!r}; what is not "
            "yours can be made in a module of your own, and be named as module:what_was_made"
        )
    made = _made(base, function, arguments or {})
    if not callable(made):
        raise ValueError(f"{name!r} must make a reward function, got {type(made).__name__}")
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
        raise ValueError(f'expected "name(key=value, ...)" with literal values, got {name!r}: {error}') from error


def _imported(name: str) -> Callable[..., Any]:
    module_name, _, function_name = name.partition(":")
    if function_name and not re.fullmatch(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*", module_name.removesuffix(".py")):
        raise ValueError(f'"module:function" names a module, as my_rewards:right, got {name!r}')
    module_name = module_name.removesuffix(".py")
    if not function_name:
        near = difflib.get_close_matches(name, BUILT_IN, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f'expected one of {", ".join(BUILT_IN)} or "module:function", got {name!r}{hint} (a reward '
            "model is named by its folder or as owner/model)"
        )
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        is_missing = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        if not is_missing:
            raise third_party_error(f"{name!r} cannot be imported", error) from error
        places = "".join(f" or in {folder}" for folder in _FOLDERS)
        raise ValueError(f"{name!r} cannot be imported: {error} among the installed packages{places}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"module {module_name!r} ({module.__file__}) has no function {function_name!r}")
    return function


def _made(name: str, factory: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    signature = inspect.signature(factory)
    known = [p.name for p in signature.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    for key in arguments:
        if key not in known and not takes_any:
            raise ValueError(f"{name!r} has no parameter {key!r}; it has {', '.join(known) or 'none'}")
    missing = [
        key for key in known if key not in arguments and signature.parameters[key].default is inspect.Parameter.empty
    ]
    if missing:
        raise ValueError(f'{name!r} needs {", ".join(missing)}, as in "{name}({missing[0]}=...)"')
    try:
        return factory(**arguments)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from error
