"""Goal-directed augmentation: more problems out of worked ones, by another start, another goal, or in hindsight.

Each function takes rows with ``prompt``, ``answer`` and ``completion`` (a trace), leaves them as they are, and returns
at most one new row for each, with the seed row's other columns, ``source`` (how it was made) and ``seed_prompt``. A
completion that does not reach the answer given for it is a ValueError. Arguments that several functions take:

    rng       of every choice
    held_out  rows whose problems are neither a seed nor a result
    key       equal for rows that pose one problem; by default the prompt up to white space and letter case
    num_rows  how many new rows to return at most
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence, Set
from functools import partial

from grpo_kernels.rewards import accuracy_reward, format_reward
from grpo_kernels.training.addition import Addition, Row, step_boundaries
from grpo_kernels.training.data.templates import join_texts, prompt_key

SEED, START, GOAL, HINDSIGHT = "seed", "start", "goal", "hindsight"  # the values of ``source``
WAYS = (START, GOAL, HINDSIGHT)
Key = Callable[[Row], Hashable]


def is_right(row: Row) -> bool:
    """Whether a row's completion has the right answer, and the form of one ``<think>`` and one ``<answer>`` element."""
    return _reaches_answer(row) and format_reward([row["prompt"]], [row["completion"]]) == [1.0]


def vary_start(
    rows: Sequence[Row],
    rng: random.Random,
    *,
    held_out: Sequence[Row] = (),
    boundaries: Callable[[str], list[int]] = step_boundaries,
    is_good: Callable[[Row], bool] = is_right,
    key: Key = prompt_key,
    num_rows: int | None = None,
) -> list[Row]:
    """Problems that start in the middle: the prompt, followed by a good trace up to the end of one of its steps.

    The new row's ``completion`` is the rest of the trace, its ``completion_prefix`` the part that the prompt now ends
    in. Prompt templates put that part after the question; rewards of the whole form need it back: see ``templates``.

    Args:
        boundaries: Where the steps of a completion end, as offsets into it; none for a text without steps.
        is_good: Whether a row's trace is worth continuing.
    """
    new_rows, excluded = [], {key(row) for row in held_out}
    for row in _seeds(rows, excluded, key):
        cuts = boundaries(row["completion"]) if row.get("completion") and is_good(row) else []
        if cuts:
            cut = rng.choice(cuts)
            prefix, rest = row["completion"][:cut], row["completion"][cut:]
            opening = {"role": "assistant", "content": prefix}
            is_text = isinstance(row["prompt"], str)
            prompt = join_texts(row["prompt"], prefix) if is_text else [*row["prompt"], opening]
            started = {"prompt": prompt, "completion": rest, "completion_prefix": prefix}
            new_rows.append(_with_source(row, START) | started)
    return _sample_distinct(new_rows, rng, num_rows)


def vary_goal(
    rows: Sequence[Row],
    rng: random.Random,
    *,
    intermediates: Callable[[Row], Sequence[Row]],
    held_out: Sequence[Row] = (),
    key: Key = prompt_key,
    num_rows: int | None = None,
) -> list[Row]:
    """Problems that stop early: an intermediate result of a row's solution, asked for by itself.

    Args:
        intermediates: The ``prompt``, ``answer`` and ``completion`` of each intermediate result; one is picked.
    """
    new_rows, excluded = [], {key(row) for row in held_out}
    for row in _seeds(rows, excluded, key):
        options = [option for option in intermediates(row) if key(option) not in excluded]
        if options:
            new_rows.append(_replace_problem(row, rng.choice(options), GOAL, "intermediates"))
    return _sample_distinct(new_rows, rng, num_rows)


def relabel(
    rows: Sequence[Row],
    rng: random.Random,
    *,
    restate: Callable[[Row], Row | None],
    held_out: Sequence[Row] = (),
    key: Key = prompt_key,
    num_rows: int | None = None,
) -> list[Row]:
    """Hindsight: a failed trace that solves another question rightly becomes a solution of that question.

    Andrychowicz et al. (arXiv:1707.01495), for questions and answers. Rows with the right answer are passed over.

    Args:
        restate: The ``prompt`` and ``answer`` of the question that a row's completion solves in every step, or None if
            there is no such question.
    """
    new_rows, excluded = [], {key(row) for row in held_out}
    for row in _seeds(rows, excluded, key):
        if row.get("completion") and not _reaches_answer(row):
            problem = restate(row)
            if problem is not None and key(problem) not in excluded:
                solved = {"completion": row["completion"], **problem}
                new_rows.append(_replace_problem(row, solved, HINDSIGHT, "restate"))
    return _sample_distinct(new_rows, rng, num_rows)


def augment(
    rows: Sequence[Row],
    rng: random.Random,
    *,
    task: Addition | None,
    held_out: Sequence[Row],
    num_rows: int | None = None,
    ways: Sequence[str] = WAYS,
) -> list[Row]:
    """Rows and, after them, what each way makes of them.

    Args:
        rows: Of the task; their ``source`` becomes "seed" where they have none.
        task: Checks each step of a trace by its own arithmetic. None for rows of any other dataset, whose start alone
            can be varied: the steps of a text are its sentences, and a good one has the right answer.
        ways: Some of "start", "goal" and "hindsight", each of which gives ``num_rows`` at most.

    Raises:
        ValueError: A way is unknown, or needs a task.
    """
    makers: dict[str, Callable[..., list[Row]]] = {START: vary_start}
    if task is not None:
        makers = {
            START: partial(vary_start, boundaries=task.boundaries, is_good=task.is_worked, key=task.key),
            GOAL: partial(vary_goal, intermediates=task.intermediates, key=task.key),
            HINDSIGHT: partial(relabel, restate=task.restate, key=task.key),
        }
    for way in ways:
        if way not in makers:
            which = "a dataset that is not built in" if task is None else "a built-in task"
            raise ValueError(f"ways of {which} must be some of {', '.join(makers)}, got {way!r}")
    augmented = [_with_source(row, SEED) | row for row in rows]
    for way in (way for way in makers if way in ways):
        augmented += makers[way](rows, rng, held_out=held_out, num_rows=num_rows)
    return augmented


def _seeds(rows: Sequence[Row], excluded: Set[Hashable], key: Key) -> list[Row]:
    """The rows to make new ones of: neither held out nor started in the middle."""
    return [row for row in rows if not row.get("completion_prefix") and key(row) not in excluded]


def _reaches_answer(row: Row) -> bool:
    return accuracy_reward([""], [row["completion"]], answer=[row["answer"]]) == [1.0]


def _with_source(row: Row, source: str) -> Row:
    """A copy of a row that says where it came from. The columns are the same whatever the source."""
    return {**row, "source": source, "seed_prompt": row["prompt"], "completion_prefix": ""}


def _replace_problem(row: Row, problem: Row, source: str, function: str) -> Row:
    """A row with another problem and its completion, without the solution of its own; ``function`` gave the problem."""
    if not _reaches_answer(problem):
        raise ValueError(
            f"{function} must give the answer that the completion reaches, got {problem['answer']!r} "
            f"for {problem['completion']!r}"
        )
    return {name: value for name, value in _with_source(row, source).items() if name != "solution"} | problem


def _sample_distinct(rows: list[Row], rng: random.Random, num_rows: int | None) -> list[Row]:
    """The first row of each prompt, and a random ``num_rows`` of them where there are more."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(repr(row["prompt"]), row)
    distinct = list(first.values())
    return distinct if num_rows is None or len(distinct) <= num_rows else rng.sample(distinct, num_rows)
