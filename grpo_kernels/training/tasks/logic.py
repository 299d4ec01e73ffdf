"""Ordering puzzles: three clues in any order say how four letters stand in a row, and one place is asked for."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Hashable

from grpo_kernels.training.tasks.base import OPENING_WORDS, Goal, Problem, SyntheticTask, other, reply

WORDINGS = 3  # puzzles on one row of letters, in the training set
_LETTERS = "ABCDEFGH"
_ASKED = ("first", "second", "third", "last")
_SHUFFLES = tuple(itertools.permutations(range(3)))
_CLUE = r"([A-H]) before ([A-H])"
_QUESTION = re.compile(rf"(?<!\S){_CLUE} , {_CLUE} , {_CLUE} : (first|second|third|last) =")
_CONCLUSION = re.compile(r"order ([A-H]) ([A-H]) ([A-H]) ([A-H]) (first|second|third|last) ")


class Logic(SyntheticTask):
    """``A before B , C before A , B before D : second =``, whose answer is ``A``.

    A problem is the row of letters, the order of its clues and the place asked for, from 0. All puzzles on one row of
    letters are held out together.
    """

    name = "logic"
    words = (*OPENING_WORDS, *_LETTERS, "before", ",", ":", "=", *_ASKED, "head", "then", "order")
    step_words = ("head", "then", "order")

    def problems(self, rng: random.Random) -> list[Problem]:
        rows = list(itertools.permutations(_LETTERS, 4))
        rng.shuffle(rows)
        return [(row, _SHUFFLES[0], 0) for row in rows]

    def wordings(self, rng: random.Random, problem: Problem) -> list[Problem]:
        ways = rng.sample(list(itertools.product(_SHUFFLES, range(4))), WORDINGS)
        return [(problem[0], shuffle, asked) for shuffle, asked in ways]

    def core(self, problem: Problem) -> Hashable:
        return problem[0]

    def prompt(self, problem: Problem) -> str:
        row, shuffle, asked = problem
        clues = " , ".join(f"{row[i]} before {row[i + 1]}" for i in shuffle)
        return f"{clues} : {_ASKED[asked]} ="

    def answer(self, problem: Problem) -> str:
        return problem[0][problem[2]]

    def trace(self, problem: Problem, rng: random.Random | None = None) -> str:
        """The row found from its head on; with ``rng``, letters are misread, or the row or the place is wrong."""
        row, _, asked = problem
        slip = None if rng is None else rng.choice(("misread", "order", "place"))
        if slip == "misread":
            row = _swapped(row, row[asked], rng.choice([letter for letter in _LETTERS if letter != row[asked]]))
        concluded = row if slip != "order" else _swapped(row, row[asked], row[other(rng, asked, range(4))])
        chosen = concluded[asked if slip != "place" else other(rng, asked, range(4))]
        conclusion = f"order {' '.join(concluded)} {_ASKED[asked]} {chosen}"
        return reply(f"{_steps(row, 3)} {conclusion}", chosen)

    def parse_prompt(self, text: str) -> Problem | None:
        match = _QUESTION.search(text)
        if match is None:
            return None
        clues = [match.group(1, 2), match.group(3, 4), match.group(5, 6)]
        for first, second, third in itertools.permutations(clues):
            if first[1] == second[0] and second[1] == third[0]:
                row = (*first, second[1], third[1])
                shuffle = tuple((first, second, third).index(clue) for clue in clues)
                return (row, shuffle, _ASKED.index(match[7])) if len(set(row)) == 4 else None
        return None

    def read_trace(self, trace: str, problem: Problem) -> Problem | None:
        """The row that is concluded; the order of the clues, which a trace does not show, from the question."""
        match = _CONCLUSION.search(trace)
        if match is None or len(set(match.group(1, 2, 3, 4))) < 4:
            return None
        return match.group(1, 2, 3, 4), problem[1], _ASKED.index(match[5])

    def goals(self, problem: Problem) -> list[Goal]:
        row, shuffle, asked = problem
        return [Goal(self.prompt((row, shuffle, i)), row[i], reply(_steps(row, i), row[i])) for i in range(asked)]


def _steps(row: tuple[str, ...], count: int) -> str:
    """The reasoning up to the letter at place ``count``."""
    return " ".join([f"head {row[0]}", *(f"then {row[i]} before {row[i + 1]}" for i in range(count))])


def _swapped(row: tuple[str, ...], one: str, two: str) -> tuple[str, ...]:
    """The row with one letter in place of another, and the other way round."""
    return tuple({one: two, two: one}.get(letter, letter) for letter in row)
