"""Names that a function or a configuration does not have: errors that say what was likely meant."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from grpo_kernels.validation import check_flag

Target = TypeVar("Target", bound=Callable[..., Any])
#: What a field or an argument is called elsewhere.
SYNONYMS = {
    **dict.fromkeys(("epsilon", "eps", "clip_eps", "clip_epsilon", "clip_range", "clip_ratio"), "epsilon_low"),
    **dict.fromkeys(("kl_coef", "kl_weight", "kl_beta", "kl_coeff"), "beta"),
    **dict.fromkeys(("entropy_coeff", "ent_coef", "entropy_bonus"), "entropy_coef"),
    **dict.fromkeys(("lmbda", "gae_lambda", "lambda_"), "lam"),
    **dict.fromkeys(("group_size", "num_return_sequences"), "num_generations"),
    "importance_sampling_ratio": "rollout_is_weights",
    "head": "lm_head_weight",
    "discount": "gamma",
}
#: Parts of a name that other frameworks write otherwise, and one way to write each.
_SPELLINGS = (
    (re.compile(r"per_token_|policy_"), ""),
    (re.compile(r"log_?p(rob)?s?$"), "logprobs"),
    (re.compile(r"^(reference|teacher)_"), "ref_"),
    (re.compile(r"^(prev|previous)_(?=logprobs$)"), "old_"),
    (re.compile(r"^(generation|rollout|vllm)_(?=logprobs$)"), "sampling_"),
    (re.compile(r"^(attention|completion|input|loss|response|token)_(?=(ids|mask)$)"), ""),
)
#: Names of TRL's that are no part of a loss function's configuration, and where they go instead.
_ELSEWHERE = {
    "num_generations": "an argument of grpo_loss, linear_grpo_loss and group_advantages",
    "scale_rewards": "an argument of grpo_loss, linear_grpo_loss and group_advantages",
    "reward_weights": "an argument of group_advantages",
    "multi_objective_aggregation": "aggregation= of group_advantages",
    "num_items_in_batch": "an argument of the loss functions",
    "loss_scale": "an argument of the loss functions",
    "softcap": "an argument of the functions that see logits",
    "logit_scale": "an argument of the functions that see logits",
    "backend": "an argument of the functions that run kernels",
    "mask_truncated_completions": "the function mask_truncated",
    "num_iterations": "the training loop's; give old_logprobs to a loss from the second iteration on",
}


def check_keywords(config: type | None = None) -> Callable[[Target], Target]:
    """Lets a function, or a class that is made by keywords, refuse an unknown keyword and say what was likely meant.

    A keyword whose default is True or False must be one of them.

    Args:
        config: The class of the function's argument ``config``, whose fields are recognised.
    """

    def decorate(target: Target) -> Target:
        if isinstance(target, type):
            target.__init__ = decorate(target.__init__)
            return target
        parameters = inspect.signature(target).parameters
        known = frozenset(parameters)
        flags = tuple(name for name, parameter in parameters.items() if isinstance(parameter.default, bool))

        @functools.wraps(target)
        def call(*positional: Any, **named: Any) -> Any:
            if not named.keys() <= known:
                raise TypeError(_unknown_argument(target, named, tuple(parameters), config))
            for name in flags:
                if name in named:
                    check_flag(name, named[name])
            return target(*positional, **named)

        return call  # type: ignore[return-value]

    return decorate


def _unknown_argument(
    target: Callable[..., Any], named: Mapping[str, Any], known: Sequence[str], config: type | None
) -> str:
    owner = target.__qualname__.removesuffix(".__init__")
    unknown = [name for name in named if name not in known]
    for name in unknown if config is not None else ():
        field = SYNONYMS.get(name, name)
        if any(each.name == field for each in fields(config)):  # type: ignore[arg-type]
            where = f"config={config.__name__}({field}=...)"  # type: ignore[union-attr]
            return f"{owner} has no argument {name!r}, which is a field of its configuration: {where}"
    arguments = tuple(sorted(name for name in known if name != "self"))
    return f"{owner} has no argument {unknown[0]!r}{likely_meant(unknown[0], arguments)}"


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
    if not hints and SYNONYMS.get(unknown) in known:
        hints = [f"{SYNONYMS[unknown]}=..."]
    if not hints and unknown in _ELSEWHERE:
        return f", which is {_ELSEWHERE[unknown]}"
    hints = hints or [f"{name}=..." for name in _similar(unknown, known)]
    return f": did you mean {' or '.join(hints)}?" if hints else f": it has {what or ', '.join(known)}"


def _similar(unknown: str, known: Sequence[str]) -> list[str]:
    """The name of the same spelling, or the one that ends or begins with ``unknown``, or else the nearest."""
    spelling = _spelling(unknown)
    for is_similar in (
        lambda name: _spelling(name) == spelling,
        lambda name: name.endswith(f"_{unknown}"),
        lambda name: name.startswith(unknown),
    ):
        similar = [name for name in known if is_similar(name)]
        if len(similar) == 1:
            return similar
    return difflib.get_close_matches(unknown, known, n=1, cutoff=0.6)


def _spelling(name: str) -> str:
    for pattern, replacement in _SPELLINGS:
        name = pattern.sub(replacement, name)
    return name
