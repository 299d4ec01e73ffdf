"""Which of two three-digit numbers is larger, reasoned from the first digit on."""

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

COUNT = 4000  # pairs of numbers
_PLACES = ("hundreds", "tens", "units")
_QUESTION = re.compile(r"(?<!\S)(\d) (\d) (\d) or (\d) (\d) (\d) =")
_STEP = re.compile(r"(?:hundreds|tens|units) (\d) (\d) (?:equal|less|greater)")
_ANSWER = re.compile(r"<answer> (\d) (\d) (\d) </answer>")


class Comparison(SyntheticTask):
    """``3 4 7 or 3 5 2 =``; a problem is its two numbers, from 100 to 999, in both orders held out together.

    The first digit that differs is as often the second or the third as it is the first.
    """

    name = "comparison"
    words = (*OPENING_WORDS, *"0123456789", "or", "=", *_PLACES, "equal", "less", "greater")
    step_words = _PLACES

    def problems(self, rng: random.Random) -> list[Problem]:
        found: dict[Hashable, Problem] = {}
        while len(found) < COUNT:
            a, place = rng.randrange(100, 1000), rng.choice((100, 10, 1))
            digit = other(rng, a // place % 10, range(1 if place == 100 else 0, 10))
            b = (a // (10 * place) * 10 + digit) * place + rng.randrange(place)
            found.setdefault(self.core((a, b)), (a, b))
        return list(found.values())

    def wordings(self, rng: random.Random, problem: Problem) -> list[Problem]:
        return [problem if rng.random() < 0.5 else (problem[1], problem[0])]

    def core(self, problem: Problem) -> Hashable:
        return tuple(sorted(problem))

    def prompt(self, problem: Problem) -> str:
        a, b = problem
        return f"{spaced(a)} or {spaced(b)} ="

    def answer(self, problem: Problem) -> str:
        return str(max(problem))

    def trace(self, problem: Problem, rng: random.Random | None = None) -> str:
        """The digits as far as they agree and one further; with ``rng``, a relation, a digit or the answer is wrong."""
        slip = None if rng is None else rng.choice(("relation", "misread", "copy"))
        a, b = _misread(rng, problem) if slip == "misread" else problem
        steps, chosen = _steps(a, b), max(a, b)
        if slip == "relation":
            steps[-1] = (steps[-1][0], "less" if a > b else "greater")
            chosen = min(a, b)
        if slip == "copy":
            chosen = rng.choice(one_digit_off(chosen))
        return reply(" ".join(f"{step} {relation}" for step, relation in steps), spaced(chosen))

    def parse_prompt(self, text: str) -> Problem | None:
        match = _QUESTION.search(text)
        return None if match is None else _problem("".join(match.group(1, 2, 3)), "".join(match.group(4, 5, 6)))

    def read_trace(self, trace: str, problem: Problem) -> Problem | None:
        """The digits that are compared; the rest from the answer and, for the number not chosen, from the question."""
        steps, answer = _STEP.findall(trace), _ANSWER.search(trace)
        if not 1 <= len(steps) <= len(_PLACES) or answer is None:
            return None
        a, b = ("".join(digits) for digits in zip(*steps, strict=True))
        chosen = "".join(answer.groups())
        if a > b:
            return _problem(chosen, b + str(problem[1])[len(b) :])
        return _problem(a + str(problem[0])[len(a) :], chosen)

    def goals(self, problem: Problem) -> list[Goal]:
        goals, said = [], []
        for place, (step, relation) in zip(_PLACES, _steps(*problem), strict=False):
            said.append(f"{step} {relation}")
            goals.append(Goal(f"{place} {self.prompt(problem)}", relation, reply(" ".join(said), relation)))
        return goals


def _steps(a: int, b: int) -> list[tuple[str, str]]:
    """A place with its two digits, and how they relate, up to the first place where they differ."""
    steps = []
    for place, x, y in zip(_PLACES, str(a), str(b), strict=True):
        steps.append((f"{place} {x} {y}", "equal" if x == y else "less" if x < y else "greater"))
        if x != y:
            break
    return steps


def _misread(rng: random.Random, problem: Problem) -> Problem:
    """The problem with a digit of the larger number changed, so that the answer changes whichever is then larger."""
    larger, smaller = max(problem), min(problem)
    changed = rng.choice([n for n in one_digit_off(larger) if n != smaller])
    return (changed, smaller) if problem[0] == larger else (smaller, changed)


def _problem(a: str, b: str) -> Problem | None:
    return (int(a), int(b)) if a[0] != "0" and b[0] != "0" and a != b else None
