"""Rewards for the form of a completion: its tags, and how much it repeats itself."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from grpo_kernels.rewards.completions import UNSPACED, completion_text, completion_tokens, script_of
from grpo_kernels.rewards.registry import check_integer, check_number, check_option

_TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
_TAG = re.compile(f"({'|'.join(_TAGS)})")


def format_reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """1 where the completion is one ``<think>`` element and one ``<answer>`` element and nothing else, else 0."""
    pieces = [_TAG.split(completion_text(c)) for c in completions]  # text and tags in turn
    return [float(p[1::2] == _TAGS and not any(p[i].strip() for i in (0, 4, 8))) for p in pieces]


def tag_count_reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """A quarter for each of the four tags that occurs exactly once; open-r1 also wants line breaks around them."""
    texts = [completion_text(c) for c in completions]
    return [sum(0.25 for tag in _TAGS if text.count(tag) == 1) for text in texts]


@dataclass(frozen=True)
class RepetitionReward:
    """``max_penalty * (1 - different n-grams / n-grams)``; 0 for a completion of fewer than n units.

    Appendix C.2 of "Demystifying Long Chain-of-Thought" (arXiv:2502.03373), as open-r1 has it.

    Args:
        n: Units in an n-gram. Of characters, and of Thai, 6 or more are what 3 are of words.
        max_penalty: The limit for a completion that says one thing over and over; at most 0.
        unit: "words", lower-cased: what stands between white space, and in scripts without spaces (Chinese, Japanese,
            Thai, Lao, Khmer, Burmese) each letter with its marks. "characters", lower-cased, white space as one. Or
            "tokens", from the column ``completion_ids``.

    Raises:
        ValueError: A parameter is out of range or unknown; when called, the column is not there.
    """

    n: int = 3
    max_penalty: float = -1.0
    unit: str = "words"

    def __post_init__(self) -> None:
        check_integer("n", self.n, 1)
        check_number("max_penalty", self.max_penalty, high=0.0)
        check_option("unit", self.unit, ("words", "characters", "tokens"))

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        if self.unit == "tokens":
            return [self._penalty(ids) for ids in completion_tokens("repetition", columns)]
        split = _words if self.unit == "words" else lambda text: " ".join(text.split())
        return [self._penalty(split(completion_text(c).lower())) for c in completions]

    def _penalty(self, units: Sequence[Any]) -> float:
        ngrams = [tuple(units[i : i + self.n]) for i in range(len(units) - self.n + 1)]
        repeated = 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
        return self.max_penalty * repeated if repeated else 0.0  # no negative zero


def _words(text: str) -> list[str]:
    words = text.split()
    return words if text.isascii() else [part for word in words for part in _split_unspaced(word)]


def _split_unspaced(word: str) -> list[str]:
    """A word between white space, with each letter of an unspaced script, and its marks, as a word of its own."""
    starts = [0]
    after_unspaced = script_of(word[0]) in UNSPACED
    for i, character in enumerate(word[1:], start=1):
        is_unspaced = script_of(character) in UNSPACED
        if (is_unspaced or after_unspaced) and unicodedata.category(character)[0] != "M":
            starts.append(i)
            after_unspaced = is_unspaced
    return [word[start:end] for start, end in pairwise([*starts, len(word)])]
