"""Goal-directed augmentation: more problems out of worked ones, by another start, another goal, or in hindsight.

Each function takes rows with ``prompt``, ``answer`` and ``completion`` (a trace), leaves them as they are, and returns
new rows only. A new row has a column ``source`` that says how it was made, and ``seed_prompt``, the question that it
was made from. Its answer is checked against its completion, and neither its problem nor that of the row that it was
made from is one of ``held_out``. The other columns are the seed row's, without ``solution`` where another is solved.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from grpo_kernels.rewards import accuracy_reward, format_reward
from grpo_kernels.rewards.completions import message_text
from grpo_kernels.training.data.templates import join_texts, question
from grpo_kernels.training.tasks import Row, SyntheticTask, step_boundaries

SEED, START, GOAL, HINDSIGHT = "seed", "start", "goal", "hindsight"  # the values of ``source``
WAYS = (START, GOAL, HINDSIGHT)


def vary_start(
    rows: Sequence[Row],
    rng: random.Random,
    *,
    held_out: Sequence[Row] = (),
    boundaries: Callable[[str], list[int]] = step_boundaries,
    is_good: Callable[[Row], bool] | None = None,
    key: Callable[[Row], Hashable] | None = None,
    num_rows: int | None = None,
) -> list[Row]:
    """Problems that start in the middle: the prompt, followed by a good trace up to the end of one of its steps.

    The new row's ``completion`` is the rest of the trace, its ``completion_prefix`` the part that the prompt now ends
    in. Prompt templates put that part after the question; rewards of the whole form need it back: see ``templates``.

    Args:
        rows: Rows with a completion; others are passed over.
        rng: Picks the step of each row, and the rows if there are too many.
        held_out: Rows whose problems must not come back.
        boundaries: Where the steps of a completion end, as offsets into it; none for a text without steps.
        is_good: Whether a row's trace is worth going on from; by default one with the right answer and form.
        key: Equal for rows that pose one problem; by default the prompt up to white space.
        num_rows: How many to return at most.

    Returns:
        At most one new row for each row.
    """
    is_good, key = is_good or is_right, key or prompt_key
    excluded = {key(row) for row in held_out}
    found = []
    for row in rows:
        if not row.get("completion") or row.get("completion_prefix") or key(row) in excluded or not is_good(row):
            continue
        cuts = boundaries(row["completion"])
        if not cuts:
            continue
        cut = rng.choice(cuts)
        prefix, rest = row["completion"][:cut], row["completion"][cut:]
        prompt = _continued(row["prompt"], prefix)
        found.append({**_made(row, START), "prompt": prompt, "completion": rest, "completion_prefix": prefix})
    return _selected(found, rng, num_rows)


def vary_goal(
    rows: Sequence[Row],
    rng: random.Random,
    *,
    intermediates: Callable[[Row], Sequence[Row]],
    held_out: Sequence[Row] = (),
    key: Callable[[Row], Hashable] | None = None,
    num_rows: int | None = None,
) -> list[Row]:
    """Problems that stop early: what the worked solution of a row finds on its way, asked for by itself.

    Args:
        rows: Rows to take apart; one need not have a completion if ``intermediates`` does without.
        rng: Picks one intermediate of each row, and the rows if there are too many.
        intermediates: The ``prompt``, ``answer`` and ``completion`` of each; none for a row without marked steps.
        held_out: Rows whose problems must not come back.
        key: Equal for rows that pose one problem; by default the prompt up to white space.
        num_rows: How many to return at most.

    Returns:
        At most one new row for each row.

    Raises:
        ValueError: An intermediate's completion does not reach its answer.
    """
    key = key or prompt_key
    excluded = {key(row) for row in held_out}
    found = []
    for row in rows:
        if row.get("completion_prefix") or key(row) in excluded:
            continue
        options = [option for option in intermediates(row) if key(option) not in excluded]
        if options:
            found.append(_restated(row, rng.choice(options), GOAL, "intermediates"))
    return _selected(found, rng, num_rows)


def relabel(
    rows: Sequence[Row],
    rng: random.Random,
    *,
    restate: Callable[[Row], Row | None],
    held_out: Sequence[Row] = (),
    key: Callable[[Row], Hashable] | None = None,
    num_rows: int | None = None,
) -> list[Row]:
    """Hindsight: a failed trace that solves another question rightly becomes a solution of that question.

    Andrychowicz et al. (arXiv:1707.01495), for questions and answers.

    Args:
        rows: Rows whose ``completion`` may have failed, as a model sampled it. One with the right answer, or none, is
            passed over.
        rng: Picks the rows if there are too many.
        restate: The ``prompt`` and ``answer`` of the question that a row's completion solves in every step, or None if
            there is no such question.
        held_out: Rows whose problems must not come back.
        key: Equal for rows that pose one problem; by default the prompt up to white space.
        num_rows: How many to return at most.

    Raises:
        ValueError: A completion does not reach the answer that ``restate`` gives.
    """
    key = key or prompt_key
    excluded = {key(row) for row in held_out}
    found = []
    for row in rows:
        if not row.get("completion") or row.get("completion_prefix") or _reaches(row["completion"], row["answer"]):
            continue
        other = restate(row)
        if other is not None and key(other) not in excluded and key(row) not in excluded:
            found.append(_restated(row, {"completion": row["completion"], **other}, HINDSIGHT, "restate"))
    return _selected(found, rng, num_rows)


def augment(
    rows: Sequence[Row],
    rng: random.Random,
    *,
    task: SyntheticTask | None,
    held_out: Sequence[Row],
    num_rows: int | None = None,
    ways: Sequence[str] = WAYS,
) -> list[Row]:
    """Rows and, after them, what each way makes of them.

    Args:
        rows: Of the task; their ``source`` becomes "seed" where they have none.
        rng: Of every choice.
        task: Checks each step of a trace by its own arithmetic or logic. None for rows of any other dataset, whose
            start alone can be varied: the steps of a text are its sentences, and a good one has the right answer.
        held_out: No wording of one of these is among the new rows.
        num_rows: New rows of each way at most.
        ways: Some of "start", "goal" and "hindsight".

    Raises:
        ValueError: A way is unknown, or needs a task.
    """
    known = WAYS if task is not None else (START,)
    for way in ways:
        if way not in known:
            which = "of a built-in task" if task is not None else "of a dataset that is not built in"
            raise ValueError(f"ways {which} must be some of {', '.join(known)}, got {way!r}")
    rules = {"held_out": held_out, "num_rows": num_rows}
    found = [{**_made(row, SEED), **row} for row in rows]
    if task is None:
        return found + (vary_start(rows, rng, **rules) if START in ways else [])
    rules["key"] = task.key
    if START in ways:
        found += vary_start(rows, rng, boundaries=task.boundaries, is_good=task.is_worked, **rules)
    if GOAL in ways:
        found += vary_goal(rows, rng, intermediates=task.intermediates, **rules)
    if HINDSIGHT in ways:
        found += relabel(rows, rng, restate=task.restate, **rules)
    return found


def is_right(row: Row) -> bool:
    """Whether a row's completion has the right answer, and the form of one ``<think>`` and one ``<answer>`` element."""
    completion = row["completion"]
    return _reaches(completion, row["answer"]) and format_reward([row["prompt"]], [completion]) == [1.0]


def prompt_key(row: Row) -> Hashable:
    """A row's question up to white space and letter case; of a chat, every message."""
    asked = question(row)
    texts = [asked] if isinstance(asked, str) else [message_text(message) for message in asked]
    return tuple(" ".join(text.split()).casefold() for text in texts)


def _reaches(completion: str, answer: Any) -> bool:
    return accuracy_reward([""], [completion], answer=[answer]) == [1.0]


def _made(row: Row, source: str) -> Row:
    """A copy of a row that says where it came from. The columns are the same whatever the source."""
    return {**row, "source": source, "seed_prompt": row["prompt"], "completion_prefix": ""}


def _restated(row: Row, problem: Row, source: str, function: str) -> Row:
    """Another problem with its completion, in a row with the seed row's other columns."""
    if not _reaches(problem["completion"], problem["answer"]):
        raise ValueError(
            f"{function} must give the answer that the completion reaches, got {problem['answer']!r} "
            f"for {problem['completion']!r}"
        )
    return {**{name: value for name, value in _made(row, source).items() if name != "solution"}, **problem}


def _continued(prompt: str | list[dict[str, Any]], prefix: str) -> str | list[dict[str, Any]]:
    """The prompt with the beginning of its answer: after a text, or as the assistant's message in a chat."""
    if isinstance(prompt, str):
        return join_texts(prompt, prefix)
    return [*prompt, {"role": "assistant", "content": prefix}]


def _selected(rows: list[Row], rng: random.Random, num_rows: int | None) -> list[Row]:
    """The rows without those whose prompt has come before, and no more than ``num_rows`` of them."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(repr(row["prompt"]), row)
    found = list(first.values())
    return found if num_rows is None or len(found) <= num_rows else rng.sample(found, num_rows)
