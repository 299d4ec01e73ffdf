"""Names that a function or a configuration does not have: errors that say what was likely meant."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import torch

from grpo_kernels.validation import as_flag

Target = TypeVar("Target", bound=Callable[..., Any])
#: What stands here for a name from elsewhere: the first of these that is known.
SYNONYMS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("epsilon", "eps", "clip_eps", "clip_epsilon", "clip_range", "clip_ratio"), ("epsilon_low",)),
    **dict.fromkeys(("cliprange", "eps_clip", "clip_ratio_low", "clip_eps_low", "eps_clip_low"), ("epsilon_low",)),
    **dict.fromkeys(("clip_ratio_high", "clip_eps_high", "clip_epsilon_high", "eps_clip_high"), ("epsilon_high",)),
    **dict.fromkeys(("kl_coef", "kl_weight", "kl_beta", "kl_coeff", "kl_loss_coef", "init_kl_coef"), ("beta",)),
    **dict.fromkeys(("kl_type", "kl_loss_type", "kl_penalty"), ("kl_estimator",)),
    **dict.fromkeys(("entropy_coeff", "ent_coef", "entropy_bonus"), ("entropy_coef",)),
    **dict.fromkeys(("lmbda", "gae_lambda", "lambda_"), ("lam",)),
    **dict.fromkeys(("group_size", "num_return_sequences"), ("num_generations",)),
    **dict.fromkeys(("adv_estimator", "advantage_estimator"), ("estimator",)),
    **dict.fromkeys(("labels", "targets", "target_ids"), ("completion_ids", "ids")),
    **dict.fromkeys(("return_entropy", "compute_entropy"), ('outputs="entropy"',)),
    **dict.fromkeys(("logits", "student_logits"), ("logits", "hidden_states")),
    **dict.fromkeys(("head", "weight"), ("lm_head_weight",)),
    **dict.fromkeys(("eos_id", "eos_token", "eos_token_ids"), ("eos_token_id",)),
    "beta": ("mixture",),
    "epsilon_low": ("epsilon",),
    "importance_sampling_ratio": ("rollout_is_weights",),
    "discount": ("gamma",),
    "temp": ("temperature",),
}
#: Parts of a name that other frameworks write otherwise, and one way to write each.
_SPELLINGS = (
    (re.compile(r"per_token_|policy_|^student_"), ""),
    (re.compile(r"log_?p(rob)?s?$"), "logprobs"),
    (re.compile(r"^(reference|teacher)_"), "ref_"),
    (re.compile(r"^(prev|previous)_(?=logprobs$)"), "old_"),
    (re.compile(r"^(generation|rollout|vllm)_(?=logprobs$)"), "sampling_"),
    (re.compile(r"^(attention|completion|input|loss|response|token)_(?=(ids|mask)$)"), ""),
)
#: Says whose a tensor is: a name with another prefix is not meant.
_PREFIX = re.compile(r"(ref_)?(chosen|rejected)_|ref_|old_|sampling_|prompt_|")
#: Names that are known elsewhere, and where.
_ELSEWHERE = {
    "num_generations": "an argument of grpo_loss, linear_grpo_loss and group_advantages",
    "scale_rewards": "an argument of grpo_loss, linear_grpo_loss and group_advantages",
    "reward_weights": "an argument of group_advantages",
    "estimator": "an argument of group_advantages",
    "multi_objective_aggregation": "aggregation= of group_advantages",
    "num_items_in_batch": "an argument of the loss functions",
    "loss_scale": "an argument of the loss functions",
    "softcap": "an argument of the functions that see logits",
    "logit_scale": "an argument of the functions that see logits",
    "logprobs": "an argument of policy_loss",
    "hidden_states": "an argument of linear_grpo_loss, linear_token_logprobs and linear_token_divergence",
    "backend": "an argument of the functions that run kernels",
    "mask_truncated_completions": "the function mask_truncated",
    "num_iterations": "the training loop's; give old_logprobs to a loss from the second iteration on",
}


def check_keywords(config: type | None = None, *, owner: str | None = None) -> Callable[[Target], Target]:
    """Lets a function, or a class that is made by keywords, refuse an unknown keyword and say what was likely meant.

    Too many positional arguments are refused too. A keyword whose default is True or False must be one of them.

    Args:
        config: The class of the function's argument ``config``, whose fields are recognised.
        owner: What messages call the function, by default its name.
    """

    def decorate(target: Target) -> Target:
        if isinstance(target, type):
            target.__init__ = _checked(target.__init__, owner or target.__name__, config, bound=1)
            return target
        return _checked(target, owner or target.__name__, config)

    return decorate


def _checked(function: Target, owner: str, config: type | None, bound: int = 0) -> Target:
    """The function with its checks; the first ``bound`` arguments are not the caller's."""
    parameters = list(inspect.signature(function).parameters.values())[bound:]
    arguments = tuple(sorted(x.name for x in parameters))
    known = frozenset(arguments)
    flags = tuple(x.name for x in parameters if isinstance(x.default, bool))
    by_name = [x.name for x in parameters if x.kind is x.KEYWORD_ONLY]
    most = len(parameters) - len(by_name)
    config_name = "" if config is None else config.__name__
    config_fields = () if config is None else tuple(each.name for each in fields(config))  # type: ignore[arg-type]
    example = "config" if "config" in by_name else next(iter(by_name), None)
    way_out = f", with the others by name, as {example}=..." if example else ""

    @functools.wraps(function)
    def call(*positional: Any, **named: Any) -> Any:
        if not named.keys() <= known:
            unknown = next(name for name in named if name not in known)
            raise TypeError(_unknown_argument(owner, unknown, arguments, config_name, config_fields))
        count = len(positional) - bound
        if count > most:
            raise TypeError(f"positional arguments of {owner} must be at most {most}{way_out}, got {count}")
        for name in flags:
            if name in named:
                named[name] = as_flag(name, named[name])
        return function(*positional, **named)

    return call  # type: ignore[return-value]


def _unknown_argument(
    owner: str, unknown: str, arguments: Sequence[str], config_name: str, config_fields: Sequence[str]
) -> str:
    field = _meant(unknown, (*config_fields, *arguments))
    if field in config_fields:
        where = f"config={config_name}({field}=...)"
        return f"{owner} has no argument {unknown!r}, which is a field of its configuration: {where}"
    return f"{owner} has no argument {unknown!r}{likely_meant(unknown, arguments)}"


def refuse_unknown(owner: str, options: Iterable[str], known: Sequence[str], what: str | None = None) -> None:
    """Raises TypeError for the first option that is not among those that are known, or ``what`` names in a message."""
    for name in options:
        if name not in known:
            raise TypeError(f"{owner} has no option {name!r}{likely_meant(name, known, what=what)}")


def likely_meant(unknown: str, known: Sequence[str], hints: Sequence[str] = (), what: str | None = None) -> str:
    """The end of a message about an unknown name: what was likely meant, or else every name that is known.

    Args:
        unknown: The name.
        known: Those that it may be a mistake for.
        hints: What to write instead, if that is known.
        what: What is known, in words.
    """
    meant = _meant(unknown, known)
    if not hints and meant is not None:
        hints = [meant if "=" in meant else f"{meant}=..."]
    if hints:
        return f": did you mean {' or '.join(hints)}?"
    elsewhere = known_as(unknown, _ELSEWHERE) or known_as(_spelling(unknown), _ELSEWHERE)
    if elsewhere is not None:
        return f", which is {'' if elsewhere == unknown else f'{elsewhere}, '}{_ELSEWHERE[elsewhere]}"
    return f": it has {what or ', '.join(known)}"


def known_as(name: str, known: Collection[str]) -> str | None:
    """The name itself or its synonym, whichever is known; a synonym may have a value, as in ``name=value``."""
    return next((each for each in (name, *SYNONYMS.get(name, ())) if each.partition("=")[0] in known), None)


def _meant(unknown: str, known: Collection[str]) -> str | None:
    """A synonym, or else the nearest name, unless the unknown one is known elsewhere."""
    name = known_as(unknown, known)
    if name is None and known_as(unknown, _ELSEWHERE) is None:
        return _nearest(unknown, known)
    return name


def _nearest(unknown: str, known: Iterable[str]) -> str | None:
    """The name that is spelled alike, or nearly so, with the same prefix."""
    prefix, wanted = _split_spelling(unknown)
    spellings = {_split_spelling(name): name for name in known}
    rests = {rest: name for (other, rest), name in spellings.items() if other == prefix}
    if torch.compiler.is_compiling():  # which cannot trace difflib
        return rests.get(wanted)
    nearest = difflib.get_close_matches(wanted, rests, n=1, cutoff=0.8)
    return rests[nearest[0]] if nearest else None


def _split_spelling(name: str) -> tuple[str, str]:
    """A name in its one spelling: the prefix that says whose the tensor is, which may be empty, and the rest."""
    spelling = _spelling(name)
    prefix = _PREFIX.match(spelling)[0]  # type: ignore[index]  it matches an empty one
    return prefix, spelling.removeprefix(prefix)


def _spelling(name: str) -> str:
    for pattern, replacement in _SPELLINGS:
        name = pattern.sub(replacement, name)
    return name
