"""Two-digit addition, reasoned digit by digit; and the same with traces that slip into a second language."""

from __future__ import annotations

import random
import re
from collections.abc import Hashable
from typing import ClassVar

from grpo_kernels.training.tasks.base import OPENING_WORDS, Goal, Problem, Row, SyntheticTask, other, reply

_QUESTION = re.compile(r"(?<!\S)(\d) (\d) \+ (\d) (\d) =")
_OPERANDS = re.compile(r"<think> units (\d) \+ (\d) = \d carry \d tens (\d) \+ (\d) \+ \d = ")


class Addition(SyntheticTask):
    """``7 8 + 4 5 =``; a problem is its two numbers, from 10 to 99. Both orders of a sum are held out together."""

    name = "addition"
    words = (*OPENING_WORDS, *"0123456789", "+", "=", "units", "tens", "carry")
    step_words = ("units", "carry", "tens")

    def problems(self, rng: random.Random) -> list[Problem]:
        pairs: list[Problem] = [(a, b) for a in range(10, 100) for b in range(a, 100)]
        rng.shuffle(pairs)
        return pairs

    def wordings(self, rng: random.Random, problem: Problem) -> list[Problem]:
        return [problem if rng.random() < 0.5 else (problem[1], problem[0])]

    def core(self, problem: Problem) -> Hashable:
        return tuple(sorted(problem))

    def prompt(self, problem: Problem) -> str:
        a, b = problem
        return f"{a // 10} {a % 10} + {b // 10} {b % 10} ="

    def answer(self, problem: Problem) -> str:
        return str(sum(problem))

    def trace(self, problem: Problem, rng: random.Random | None = None) -> str:
        """The worked sum; with ``rng``, one written digit is wrong and later steps follow it."""
        slip = -1 if rng is None else rng.randrange(3)

        def written(value: int, position: int) -> int:
            return other(rng, value, range(10)) if rng is not None and slip == position else value

        a, b = problem
        (a_tens, a_units), (b_tens, b_units) = divmod(a, 10), divmod(b, 10)
        carry, units = divmod(a_units + b_units, 10)
        units = written(units, 0)
        if slip == 1:
            carry = 1 - carry
        hundreds, tens = divmod(a_tens + b_tens + carry, 10)
        tens = written(tens, 2)
        total = f"1 {tens}" if hundreds else str(tens)
        return reply(
            f"units {a_units} + {b_units} = {units} carry {carry} tens {a_tens} + {b_tens} + {carry} = {total}",
            f"{total} {units}",
        )

    def parse_prompt(self, text: str) -> Problem | None:
        match = _QUESTION.search(text)
        if match is None or match[1] == "0" or match[3] == "0":
            return None
        return int(match[1] + match[2]), int(match[3] + match[4])

    def read_trace(self, trace: str, problem: Problem) -> Problem | None:
        match = _OPERANDS.match(trace)
        if match is None or match[3] == "0" or match[4] == "0":
            return None
        return int(match[3] + match[1]), int(match[4] + match[2])

    def goals(self, problem: Problem) -> list[Goal]:
        a, b = problem
        carry, units = divmod(a % 10 + b % 10, 10)
        steps, question = f"units {a % 10} + {b % 10} = {units}", self.prompt(problem)
        return [
            Goal(f"units {question}", str(units), reply(steps, str(units))),
            Goal(f"carry {question}", str(carry), reply(f"{steps} carry {carry}", str(carry))),
        ]


class MixedAddition(Addition):
    """Addition whose imperfect traces put French words for about half of the words in about half of the traces.

    Problems and split are those of ``addition`` at the same seed. Every row names the words that its reasoning should
    keep to, in the column ``target_words``: the English ones, and the digits and signs, which any language has.
    """

    name = "addition-mixed"
    french: ClassVar[dict[str, str]] = {"units": "unités", "tens": "dizaines", "carry": "retenue"}
    words = (*Addition.words, *french.values())
    step_words = (*Addition.step_words, *french.values())
    target_words = tuple(word for word in Addition.words if word not in OPENING_WORDS)
    mixed_rate = 0.5  # of the traces
    mixed_word_rate = 0.5  # of the words of a mixed trace

    def columns(self) -> Row:
        return {"target_words": list(self.target_words)}

    def imperfect_trace(self, rng: random.Random, problem: Problem) -> str:
        """A trace with a slip, a broken tag and French words, each at its rate."""
        text = super().imperfect_trace(rng, problem)
        if rng.random() >= self.mixed_rate:
            return text
        return " ".join(
            self.french[word] if word in self.french and rng.random() < self.mixed_word_rate else word
            for word in text.split()
        )

    def parse_trace(self, trace: str, problem: Problem) -> Problem | None:
        """As for addition, whatever the language of each word."""
        english = {french: word for word, french in self.french.items()}
        return super().parse_trace(" ".join(english.get(word, word) for word in trace.split()), problem)

    def is_worked(self, row: Row) -> bool:
        """Whether a completion is right in every step, and in one language."""
        return super().is_worked(row) and not set(row["completion"].split()) & set(self.french.values())
