"""Two-digit subtraction, reasoned digit by digit."""

from __future__ import annotations

import random
import re
from collections.abc import Hashable

from grpo_kernels.training.tasks.base import (
    OPENING_WORDS,
    Goal,
    Problem,
    SyntheticTask,
    one_digit_off,
    other,
    reply,
    spaced,
)

_QUESTION = re.compile(r"(?<!\S)(\d) (\d) - (\d) (\d) =")
_OPERANDS = re.compile(r"<think> units (?:1 )?(\d) - (\d) = \d borrow \d tens (\d) - (\d) - \d = ")


class Subtraction(SyntheticTask):
    """``7 3 - 4 5 =``; a problem is its two numbers, from 10 to 99, the first at least the second."""

    name = "subtraction"
    words = (*OPENING_WORDS, *"0123456789", "-", "=", "units", "tens", "borrow")
    step_words = ("units", "borrow", "tens")

    def problems(self, rng: random.Random) -> list[Problem]:
        pairs: list[Problem] = [(a, b) for b in range(10, 100) for a in range(b, 100)]
        rng.shuffle(pairs)
        return pairs

    def core(self, problem: Problem) -> Hashable:
        return problem

    def prompt(self, problem: Problem) -> str:
        a, b = problem
        return f"{spaced(a)} - {spaced(b)} ="

    def answer(self, problem: Problem) -> str:
        return str(problem[0] - problem[1])

    def trace(self, problem: Problem, rng: random.Random | None = None) -> str:
        """The worked difference; with ``rng``, a result or the borrow is wrong, or a digit is misread."""
        slip = None if rng is None else rng.choice(_slips(*problem))
        a, b = _misread(rng, problem) if slip == "misread" else problem
        top, units, borrow = _units_step(a, b)
        if slip == "units":
            units = other(rng, units, range(10))
        if slip == "borrow":
            borrow = 1 - borrow
        tens = a // 10 - b // 10 - borrow
        if slip == "tens":
            tens = other(rng, tens, range(10))
        return reply(
            f"units {top} - {b % 10} = {units} borrow {borrow} tens {a // 10} - {b // 10} - {borrow} = {tens}",
            f"{tens} {units}" if tens else str(units),
        )

    def parse_prompt(self, text: str) -> Problem | None:
        match = _QUESTION.search(text)
        return None if match is None else _problem(int(match[1] + match[2]), int(match[3] + match[4]))

    def read_trace(self, trace: str, problem: Problem) -> Problem | None:
        match = _OPERANDS.match(trace)
        return None if match is None else _problem(int(match[3] + match[1]), int(match[4] + match[2]))

    def goals(self, problem: Problem) -> list[Goal]:
        a, b = problem
        top, units, borrow = _units_step(a, b)
        steps, question = f"units {top} - {b % 10} = {units}", self.prompt(problem)
        return [
            Goal(f"units {question}", str(units), reply(steps, str(units))),
            Goal(f"borrow {question}", str(borrow), reply(f"{steps} borrow {borrow}", str(borrow))),
        ]


def _units_step(a: int, b: int) -> tuple[str, int, int]:
    """The upper digit as it is written, with the ten that it borrowed before it, the resulting digit, the borrow."""
    borrow = int(a % 10 < b % 10)
    return f"1 {a % 10}" if borrow else str(a % 10), a % 10 + 10 * borrow - b % 10, borrow


def _slips(a: int, b: int) -> list[str]:
    """What can go wrong; a borrow that is not needed takes a ten that must be there."""
    kinds = ["units", "tens", "misread"]
    return [*kinds, "borrow"] if a % 10 < b % 10 or a // 10 > b // 10 else kinds


def _misread(rng: random.Random, problem: Problem) -> Problem:
    a, b = problem
    pairs = [(x, b) for x in one_digit_off(a)] + [(a, y) for y in one_digit_off(b)]
    return rng.choice([pair for pair in pairs if _problem(*pair)])


def _problem(a: int, b: int) -> Problem | None:
    return (a, b) if a >= b >= 10 else None
