"""Rewards for the length of a completion."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from grpo_kernels.rewards.answers import JUDGES
from grpo_kernels.rewards.completions import completion_text, completion_tokens
from grpo_kernels.rewards.registry import RewardFunction, check_integer, check_number, check_option
from grpo_kernels.rewards.scoring import score


@dataclass(frozen=True)
class _JudgedLength(ABC):
    """A reward by length and by whether another reward, the judge, calls the completion right."""

    _name: ClassVar[str]  # as in a recipe

    judge: str | RewardFunction = "accuracy"
    unit: str = "characters"
    tokenizer: Any = None

    def __post_init__(self) -> None:
        if not callable(self.judge) and self.judge not in JUDGES:
            raise ValueError(f"judge must be a reward function or one of {', '.join(JUDGES)}, got {self.judge!r}")
        check_option("unit", self.unit, ("characters", "tokens"))

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        judge = self.judge if callable(self.judge) else JUDGES[self.judge]
        verdicts = score({"judge": judge}, prompts, completions, columns)[:, 0].tolist()
        rewards = self._rewards(prompts, self._lengths(completions, columns), [value >= 1.0 for value in verdicts])
        return [None if math.isnan(value) else reward for value, reward in zip(verdicts, rewards, strict=True)]

    @abstractmethod
    def _rewards(self, prompts: Sequence[Any], lengths: list[int], is_right: list[bool]) -> list[float]: ...

    def _lengths(self, completions: Sequence[Any], columns: dict[str, Any]) -> list[int]:
        if self.tokenizer is None and self.unit == "tokens":
            return [len(ids) for ids in completion_tokens(self._name, columns)]
        texts = map(completion_text, completions)
        if self.tokenizer is None:
            return list(map(len, texts))
        return [len(self._encode(text, add_special_tokens=False)["input_ids"]) for text in texts]

    @cached_property
    def _encode(self) -> Callable[..., Any]:
        if not isinstance(self.tokenizer, str):
            return self.tokenizer
        from transformers import AutoTokenizer  # only a tokenizer by name needs it

        return AutoTokenizer.from_pretrained(self.tokenizer)


@dataclass(frozen=True)
class LengthReward(_JudgedLength):
    """Kimi k1.5's length reward (arXiv:2501.12599, sec. 2.3.3): among answers to one prompt shorter is better.

    With ``s = 0.5 - (length - shortest) / (longest - shortest)`` over the completions of the same prompt, a right
    answer earns s and a wrong one min(0, s). Where all are of one length, 0.

    Args:
        judge: "accuracy", "exact_match", "math_accuracy" or a reward function: an answer is right from a reward of 1.
            Where it abstains, so does this reward.
        unit: What is counted: "characters" of the text, or "tokens" by the column ``completion_ids``.
        tokenizer: A tokenizer or the name of one, whose tokens are counted, whatever ``unit`` says.

    Raises:
        ValueError: A parameter is unknown; when called, the column is not there.
    """

    _name = "length"

    def _rewards(self, prompts: Sequence[Any], lengths: list[int], is_right: list[bool]) -> list[float]:
        groups: dict[str, list[int]] = defaultdict(list)  # by repr: a prompt of chat messages cannot be hashed
        keys = list(map(repr, prompts))
        for key, length in zip(keys, lengths, strict=True):
            groups[key].append(length)
        rewards = []
        for key, length, right in zip(keys, lengths, is_right, strict=True):
            shortest, longest = min(groups[key]), max(groups[key])
            reward = 0.5 - (length - shortest) / (longest - shortest) if longest > shortest else 0.0
            rewards.append(reward if right else min(0.0, reward))
        return rewards


@dataclass(frozen=True)
class CosineLengthReward(_JudgedLength):
    """The cosine length reward of "Demystifying Long Chain-of-Thought" (arXiv:2502.03373, appendix C.1).

    ``end + (start - end) / 2 * (1 + cos(pi * length / max_len))``, from max to min for a right answer and from min to
    max for a wrong one. Beyond ``max_len`` it stays there, as in TRL; open-r1 lets the cosine rise again.

    Args:
        judge: As for ``LengthReward``, and so are ``unit`` and ``tokenizer``.
        min_value_wrong, max_value_correct: For a length of 0.
        max_value_wrong, min_value_correct: For ``max_len`` or longer.
        max_len: In what ``unit`` or ``tokenizer`` counts.

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

    def _rewards(self, prompts: Sequence[Any], lengths: list[int], is_right: list[bool]) -> list[float]:
        right_ends = (self.max_value_correct, self.min_value_correct)
        wrong_ends = (self.min_value_wrong, self.max_value_wrong)
        rewards = []
        for length, right in zip(lengths, is_right, strict=True):
            start, end = right_ends if right else wrong_ends
            rewards.append(end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * min(1.0, length / self.max_len))))
        return rewards


@dataclass(frozen=True)
class OverlongReward:
    """DAPO's soft overlong punishment (arXiv:2503.14476, eq. 13), by the tokens of the column ``completion_ids``.

    Args:
        max_completion_len: Tokens from which on it is -1.
        soft_punish_cache: Tokens before that over which it falls in a line from 0; 0 for none.

    Raises:
        ValueError: A parameter is out of range; when called, the column is not there.
    """

    max_completion_len: int
    soft_punish_cache: int

    def __post_init__(self) -> None:
        check_integer("max_completion_len", self.max_completion_len, 1)
        check_integer("soft_punish_cache", self.soft_punish_cache, 0)
        if self.soft_punish_cache > self.max_completion_len:
            limit = f"max_completion_len ({self.max_completion_len})"
            raise ValueError(f"soft_punish_cache must be at most {limit}, got {self.soft_punish_cache}")

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        start = self.max_completion_len - self.soft_punish_cache
        span = self.soft_punish_cache or 1  # without one, the first token beyond costs the most
        return [max(-1.0, min(0.0, (start - len(ids)) / span)) for ids in completion_tokens("overlong", columns)]
