"""Rewards for the length of a completion."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from grpo_kernels.rewards.answers import JUDGES
from grpo_kernels.rewards.completions import completion_text
from grpo_kernels.rewards.parameters import check_integer, check_number
from grpo_kernels.rewards.scoring import RewardFunction, score

_UNITS = ("characters", "tokens")


@dataclass(frozen=True)
class _Judged:
    """A reward that asks another whether a completion is right, and how long it is."""

    _name: ClassVar[str]  # as in a recipe

    judge: str | RewardFunction = "accuracy"
    unit: str = "characters"
    tokenizer: Any = None

    def __post_init__(self) -> None:
        if not callable(self.judge) and self.judge not in JUDGES:
            raise ValueError(f"judge must be a reward function or one of {', '.join(JUDGES)}, got {self.judge!r}")
        if self.unit not in _UNITS:
            raise ValueError(f"unit must be one of {', '.join(_UNITS)}, got {self.unit!r}")

    def _right(
        self, prompts: Sequence[Any], completions: Sequence[Any], columns: dict[str, Any]
    ) -> list[bool | None]:  # [B]
        """Whether each completion earns the judge's whole 1; None where the judge abstains."""
        judge = self.judge if callable(self.judge) else JUDGES[self.judge]
        values = score({"judge": judge}, prompts, completions, columns)[:, 0].tolist()
        return [None if math.isnan(value) else value >= 1.0 for value in values]

    def _lengths(self, completions: Sequence[Any], columns: dict[str, Any]) -> list[int]:  # [B]
        if self.tokenizer is None and self.unit == "tokens":
            return token_counts(self._name, columns)
        texts = [completion_text(c) for c in completions]
        if self.tokenizer is None:
            return [len(text) for text in texts]
        return [len(self._encode(text, add_special_tokens=False)["input_ids"]) for text in texts]

    @cached_property
    def _encode(self) -> Callable[..., Any]:
        if not isinstance(self.tokenizer, str):
            return self.tokenizer
        from transformers import AutoTokenizer  # only a tokenizer by name needs it

        return AutoTokenizer.from_pretrained(self.tokenizer)


@dataclass(frozen=True)
class LengthReward(_Judged):
    """Kimi k1.5's length reward (arXiv:2501.12599, sec. 2.3.3): among answers to one prompt shorter is better.

    With ``s = 0.5 - (length - shortest) / (longest - shortest)`` over the completions of the same prompt, a right
    answer earns s and a wrong one min(0, s). Where all are of one length, 0.

    Args:
        judge: Who says what is right: "accuracy", "exact_match", "math_accuracy" or a reward function, whose reward is
            then 1 or more. Where it abstains, so does this reward.
        unit: What is counted: "characters" of the text, or "tokens" by the column ``completion_ids``.
        tokenizer: A tokenizer or the name of one. The text's tokens by it are then counted, whatever ``unit`` says.

    Raises:
        ValueError: A parameter is unknown; when called, the column is not there.
    """

    _name = "length"

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        lengths = self._lengths(completions, columns)
        keys = [repr(prompt) for prompt in prompts]  # a prompt of chat messages cannot be hashed
        groups: dict[str, list[int]] = defaultdict(list)
        for key, length in zip(keys, lengths, strict=True):
            groups[key].append(length)
        ranges = {key: (min(of_one_prompt), max(of_one_prompt)) for key, of_one_prompt in groups.items()}
        rewards: list[float | None] = []
        for key, length, right in zip(keys, lengths, self._right(prompts, completions, columns), strict=True):
            shortest, longest = ranges[key]
            share = 0.5 - (length - shortest) / (longest - shortest) if longest > shortest else 0.0
            rewards.append(None if right is None else share if right else min(0.0, share))
        return rewards


@dataclass(frozen=True)
class CosineLengthReward(_Judged):
    """The cosine length reward of "Demystifying Long Chain-of-Thought" (arXiv:2502.03373, appendix C.1).

    From ``start`` at length 0 to ``end`` at ``max_len`` along half a cosine,
    ``end + (start - end) / 2 * (1 + cos(pi * length / max_len))``: for a right answer from ``max_value_correct`` down
    to ``min_value_correct``, so that shorter is better; for a wrong one from ``min_value_wrong`` up to
    ``max_value_wrong``, so that longer is less bad. Beyond ``max_len`` it stays at ``end``, as in TRL; open-r1 lets
    the cosine rise again.

    Args:
        judge: As for ``LengthReward``, and so are ``unit`` and ``tokenizer``.
        min_value_wrong: For the shortest wrong answer.
        max_value_wrong: For a wrong answer of ``max_len`` or longer.
        min_value_correct: For a right answer of ``max_len`` or longer.
        max_value_correct: For the shortest right answer.
        max_len: The length at which a reward has gone all the way, in what ``unit`` or ``tokenizer`` counts.

    Raises:
        ValueError: A parameter is unknown or out of range; when called, the column is not there.
    """

    _name = "cosine_length"

    min_value_wrong: float = -1.0
    max_value_wrong: float = -0.5
    min_value_correct: float = 0.5
    max_value_correct: float = 1.0
    max_len: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("max_len", self.max_len, 1)
        for kind in ("wrong", "correct"):
            low, high = f"min_value_{kind}", f"max_value_{kind}"
            check_number(low, getattr(self, low))
            check_number(high, getattr(self, high), low=getattr(self, low))

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        right = self._right(prompts, completions, columns)
        lengths = self._lengths(completions, columns)
        return [None if r is None else self._scaled(r, n) for r, n in zip(right, lengths, strict=True)]

    def _scaled(self, right: bool, length: int) -> float:
        if right:
            start, end = self.max_value_correct, self.min_value_correct
        else:
            start, end = self.min_value_wrong, self.max_value_wrong
        return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * min(1.0, length / self.max_len)))


@dataclass(frozen=True)
class OverlongReward:
    """DAPO's soft overlong punishment (arXiv:2503.14476, eq. 13), over tokens and nothing else.

    0 up to ``max_completion_len - soft_punish_cache``, then falling in a line to -1 at ``max_completion_len``, and -1
    beyond. The lengths are those of the column ``completion_ids``, one list of tokens per completion.

    Args:
        max_completion_len: Tokens.
        soft_punish_cache: Tokens before that over which the punishment grows; 0 for none.

    Raises:
        ValueError: A parameter is out of range; when called, the column is not there.
    """

    max_completion_len: int
    soft_punish_cache: int

    def __post_init__(self) -> None:
        check_integer("max_completion_len", self.max_completion_len, 1)
        check_integer("soft_punish_cache", self.soft_punish_cache, 0)
        if self.soft_punish_cache > self.max_completion_len:
            raise ValueError(
                f"soft_punish_cache must be at most max_completion_len ({self.max_completion_len}), "
                f"got {self.soft_punish_cache}"
            )

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        return [self._punishment(length) for length in token_counts("overlong", columns)]

    def _punishment(self, length: int) -> float:
        over = length - (self.max_completion_len - self.soft_punish_cache)
        if over <= 0:
            return 0.0
        return -min(1.0, over / self.soft_punish_cache) if self.soft_punish_cache else -1.0


def token_lists(reward: str, columns: dict[str, Any]) -> list[list[int]]:  # [B]
    """The tokens of each completion; raises ValueError, naming the reward, without ``completion_ids``."""
    if columns.get("completion_ids") is None:
        known = ", ".join(sorted(columns)) or "none"
        raise ValueError(f"{reward} needs the column completion_ids, one list of tokens per completion; it has {known}")
    return columns["completion_ids"]


def token_counts(reward: str, columns: dict[str, Any]) -> list[int]:  # [B]
    """The number of tokens of each completion; raises ValueError, naming the reward, without ``completion_ids``."""
    return [len(ids) for ids in token_lists(reward, columns)]
