"""Rewards for the form of a completion: its tags, and how much it repeats itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grpo_kernels.training.rewards.parameters import check_integer, check_number

_FORMAT = re.compile(
    r"\s*<think>((?!</?think>|</?answer>).)*</think>\s*<answer>((?!</?think>|</?answer>).)*</answer>\s*", re.DOTALL
)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def format_reward(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """1 where the completion is one ``<think>`` element and one ``<answer>`` element and nothing else, else 0."""
    return [float(_FORMAT.fullmatch(c) is not None) for c in completions]


def tag_count_reward(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """A quarter for each of the four tags of the format that occurs exactly once.

    open-r1's reward of this name wants line breaks around the tags, too.
    """
    return [sum(0.25 for tag in _TAGS if c.count(tag) == 1) for c in completions]


@dataclass(frozen=True)
class RepetitionReward:
    """``max_penalty * (1 - different n-grams / n-grams)``, over lower-cased words between white space.

    Appendix C.2 of "Demystifying Long Chain-of-Thought" (arXiv:2502.03373), as open-r1 has it. 0 where nothing
    repeats, and for a completion of fewer than n words.

    Args:
        n: Words in an n-gram.
        max_penalty: What a completion comes close to that says one thing over and over; at most 0.

    Raises:
        ValueError: A parameter is out of range.
    """

    n: int = 3
    max_penalty: float = -1.0

    def __post_init__(self) -> None:
        check_integer("n", self.n, 1)
        check_number("max_penalty", self.max_penalty, high=0.0)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
        return [self._penalty(c.lower().split()) for c in completions]

    def _penalty(self, words: list[str]) -> float:
        ngrams = [tuple(words[i : i + self.n]) for i in range(len(words) - self.n + 1)]
        repeated = 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
        return self.max_penalty * repeated if repeated else 0.0  # no negative zero
