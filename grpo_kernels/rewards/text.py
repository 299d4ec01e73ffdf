"""Rewards for the form of a completion: its tags, and how much it repeats itself."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from grpo_kernels.rewards.completions import completion_text
from grpo_kernels.rewards.language import UNSPACED, script_of
from grpo_kernels.rewards.length import token_lists
from grpo_kernels.rewards.parameters import check_integer, check_number

_UNITS = ("words", "characters", "tokens")
_TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
_TAG = re.compile(f"({'|'.join(_TAGS)})")


def format_reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """1 where the completion is one ``<think>`` element and one ``<answer>`` element and nothing else, else 0."""
    return [float(_has_format(completion_text(c))) for c in completions]


def tag_count_reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """A quarter for each of the four tags of the format that occurs exactly once.

    open-r1's reward of this name wants line breaks around the tags, too.
    """
    texts = [completion_text(c) for c in completions]
    return [sum(0.25 for tag in _TAGS if text.count(tag) == 1) for text in texts]


@dataclass(frozen=True)
class RepetitionReward:
    """``max_penalty * (1 - different n-grams / n-grams)``.

    Appendix C.2 of "Demystifying Long Chain-of-Thought" (arXiv:2502.03373), as open-r1 has it. 0 where nothing
    repeats, and for a completion of fewer than n units.

    Args:
        n: Units in an n-gram.
        max_penalty: What a completion comes close to that says one thing over and over; at most 0.
        unit: "words", lower-cased: what stands between white space, and in scripts that are written without spaces
            (Chinese, Japanese, Thai, Lao, Khmer, Burmese) each letter with its marks. "characters", lower-cased, white
            space but as one. Or "tokens", from the column ``completion_ids``. Letters recur more than words do: of
            characters, and in Thai, an n of 6 or more is what 3 is of words.

    Raises:
        ValueError: A parameter is out of range or unknown; when called, the column is not there.
    """

    n: int = 3
    max_penalty: float = -1.0
    unit: str = "words"

    def __post_init__(self) -> None:
        check_integer("n", self.n, 1)
        check_number("max_penalty", self.max_penalty, high=0.0)
        if self.unit not in _UNITS:
            raise ValueError(f"unit must be one of {', '.join(_UNITS)}, got {self.unit!r}")

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        if self.unit == "tokens":
            return [self._penalty(ids) for ids in token_lists("repetition", columns)]
        texts = [completion_text(c).lower() for c in completions]
        if self.unit == "characters":
            return [self._penalty(" ".join(text.split())) for text in texts]
        return [self._penalty(_words(text)) for text in texts]

    def _penalty(self, units: Sequence[Any]) -> float:
        ngrams = [tuple(units[i : i + self.n]) for i in range(len(units) - self.n + 1)]
        repeated = 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
        return self.max_penalty * repeated if repeated else 0.0  # no negative zero


def _has_format(text: str) -> bool:
    pieces = _TAG.split(text)
    return pieces[1::2] == _TAGS and not any(pieces[i].strip() for i in (0, 4, 8))  # before, between and after


def _words(text: str) -> list[str]:
    words = text.split()
    return words if text.isascii() else [part for word in words for part in _split_unspaced(word)]


def _split_unspaced(word: str) -> list[str]:
    """A word between white space, with each letter of an unspaced script as a word of its own."""
    starts: list[int] = []
    part_is_unspaced = False  # the letter that the last part begins with
    for i, character in enumerate(word):
        is_mark = unicodedata.category(character)[0] == "M"
        is_unspaced = script_of(character) in UNSPACED
        if not starts or (not is_mark and (is_unspaced or part_is_unspaced)):
            starts.append(i)
            part_is_unspaced = is_unspaced
    return [word[start:end] for start, end in pairwise([*starts, len(word)])]
