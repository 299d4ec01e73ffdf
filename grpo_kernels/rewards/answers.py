"""Rewards for the right answer: equal text, equal as a number, or equal as mathematics."""

from __future__ import annotations

import ctypes
import math
import re
import threading
import time
from collections.abc import Callable, Sequence
from decimal import Context, Decimal
from typing import Any

from grpo_kernels.rewards.answer_places import answer_element
from grpo_kernels.rewards.completions import completion_text

_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?(?:[eE][+-]?\d{1,6})?", re.ASCII)
_EXACT = Context(prec=100_000)  # digits
_SECONDS = 3.0  # what one answer may take to read, and one comparison
_AGAIN = 1.0  # seconds until a time limit raises once more, as a destructor may have swallowed the exception


def extract_answer(completion: str) -> str | None:
    """The text of the last complete ``<answer>`` element without its white space, or None if there is none.

    Elements in the reasoning, before the last ``</think>``, count only where nothing stands after it. Of tags without a
    partner, as where the reasoning mentions them, none counts.

    Example:
        >>> extract_answer("I will use <answer> tags.</think><answer>4</answer> or rather <answer>4 2</answer>")
        '42'
    """
    answer = answer_element(completion_text(completion))
    return None if answer is None else "".join(answer.split())


def accuracy_reward(
    prompts: Sequence[Any], completions: Sequence[Any], *, answer: Sequence[Any], **columns: Any
) -> list[float]:
    """1 where the completion's ``<answer>`` equals the ``answer`` column, else 0.

    Numbers are compared by value: 5, 5.0, 05, +5 and 5e0 are equal, and so are 1,000 and 1000; 1,00 is no number. Other
    text is equal up to white space, and of a column of truth values up to case. A formula, a fraction such as 1/2 and
    a unit are text: see ``math_accuracy``.
    """
    expected = [_spell_number("".join(str(a).split())) for a in answer]
    texts = [_spelled_answer(c) for c in completions]
    texts = [t.title() if t and isinstance(a, bool) else t for t, a in zip(texts, answer, strict=True)]
    return [float(t == e) for t, e in zip(texts, expected, strict=True)]


def exact_match_reward(
    prompts: Sequence[Any], completions: Sequence[Any], *, answer: Sequence[Any], **columns: Any
) -> list[float]:
    """1 where the whole completion equals the ``answer`` column up to white space around it, else 0."""
    return [float(completion_text(c).strip() == str(a).strip()) for c, a in zip(completions, answer, strict=True)]


def math_accuracy_reward(
    prompts: Sequence[Any], completions: Sequence[Any], *, answer: Sequence[Any], **columns: Any
) -> list[float | None]:
    """1 where the completion's answer equals the ``answer`` column as mathematics, else 0; parsed by math-verify.

    The column holds LaTeX, with or without dollars or a ``\\boxed``, a number, or a solution that ends in ``#### 42``,
    as GSM8K's do; or one word, a ``\\text{...}`` or a choice such as (B), which are compared as text; or a list of
    these, all of which have to be given. Where it holds several plain words, an empty text or None the reward abstains.

    The completion's answer is its last complete ``<answer>`` element; else what follows its last ``####``; else its
    last ``\\boxed``; else its last formula in LaTeX, one that the word answer announces before others. A box or formula
    that the words next to it deny ("is wrong") is no answer, nor is a plain number in running text. Reasoning, before
    the last ``</think>``, counts only where nothing stands after it.

    An answer is right only if all of it was read, from its first character to its last:

    - Markdown, delimiters, thousands separators, a currency and a unit do not matter, but for one other than the
      column's; nor do words before it such as "the area is", and words after it that are no number, comparison or
      denial ("5 halves", "3 or more").
    - Numbers are compared exactly. A decimal of six or more places also equals a number without end that it is the
      correct rounding of. A percent sign on one side only may be a unit or a hundredth.
    - Sets and lists are equal in any order, pairs and intervals in one. ``x = 5`` equals 5. Several candidates, as "3
      or 4", equal only the set of them.
    - What cannot be parsed is equal to the same text only. Sums, integrals and limits are not worked out.

    Reading and comparing may take 3 seconds each, after which an answer is wrong. Numbers too large to work out are
    wrong at once.

    Raises:
        ImportError: math-verify is not installed.
    """
    math_answers = _import_math_answers()
    with TimeLimit(_SECONDS) as limit:
        golds = [_limited(limit, math_answers.read_gold, _text_of(a)) for a in answer]
        texts = [completion_text(c) for c in completions]
        answers = [
            gold and _limited(limit, math_answers.read_completion, t) for gold, t in zip(golds, texts, strict=True)
        ]
        return [
            gold and float(bool(read and _limited(limit, math_answers.same_answer, gold, read)))
            for gold, read in zip(golds, answers, strict=True)
        ]


def math_answer(completion: Any) -> str | None:
    """A completion's answer as ``math_accuracy_reward`` reads it: equal answers have one spelling.

    None where there is none, or where not all of it was read.
    """
    math_answers = _import_math_answers()
    with TimeLimit(_SECONDS) as limit:
        read = _limited(limit, math_answers.read_completion, completion_text(completion))
        return read and _limited(limit, math_answers.spelling_of_answer, read)


def _spelled_answer(completion: Any) -> str | None:
    """The answer that ``accuracy_reward`` compares: a number in one spelling."""
    text = extract_answer(completion)
    return None if text is None else _spell_number(text)


JUDGES = {
    "accuracy": accuracy_reward,
    "exact_match": exact_match_reward,
    "math_accuracy": math_accuracy_reward,
}
#: By judge, what reads a completion's answer, for votes. A judge of one's own has it as its attribute ``extract``.
EXTRACTS: dict[Callable[..., Any], Callable[[str], str | None]] = {
    accuracy_reward: _spelled_answer,
    exact_match_reward: str.strip,
    math_accuracy_reward: math_answer,
}


def extract_of(judge: Callable[..., Any]) -> Callable[[str], str | None] | None:
    """What reads the answer that a judge judges; None where it judges no answer that could be voted on."""
    known = next((extract for function, extract in EXTRACTS.items() if function is judge), None)
    return getattr(judge, "extract", known)


class TimeLimit:
    """Ends calls of the thread that enters it after ``seconds`` each; an alarm would reach the main thread alone.

    Python code is interrupted, but no single call into C. Limited calls cannot be made within each other.

    Example:
        >>> with TimeLimit(2.0) as limit:
        ...     limit.call(sum, [1, 2])
        3
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._deadline = math.inf  # of the call that runs
        self._lock = threading.Lock()
        self._is_closed = threading.Event()

    def __enter__(self) -> TimeLimit:
        self._thread = ctypes.c_ulong(threading.get_ident())
        threading.Thread(target=self._watch, daemon=True, name="time limit").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_closed.set()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function returns; raises TimeoutError if that takes longer than the limit."""
        try:
            try:
                with self._lock:
                    self._deadline = time.monotonic() + self._seconds
                return function(*arguments)
            finally:
                with self._lock:
                    self._deadline = math.inf
                ctypes.pythonapi.PyThreadState_SetAsyncExc(self._thread, None)  # one that was sent and not yet raised
        except _Overrun:
            raise TimeoutError(f"the call took more than {self._seconds} seconds") from None

    def _watch(self) -> None:
        pause = self._seconds
        while not self._is_closed.wait(min(pause, self._seconds)):
            with self._lock:
                if self._deadline <= time.monotonic():
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(self._thread, ctypes.py_object(_Overrun))
                    self._deadline = time.monotonic() + _AGAIN
                pause = self._deadline - time.monotonic()


class _Overrun(BaseException):
    """Raised in the thread whose call takes too long; no ``except Exception`` on the way catches it."""


def _limited(limit: TimeLimit, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns; None where it takes too long."""
    try:
        return limit.call(function, *arguments)
    except (TimeoutError, RecursionError):
        return None


def _text_of(answer: Any) -> str:
    """A value of the ``answer`` column as text; of a list of answers, all of them."""
    if isinstance(answer, (list, tuple)):
        return ", ".join(map(_text_of, answer))
    return "" if answer is None else str(answer)


def _import_math_answers() -> Any:
    try:
        import math_verify  # noqa: F401 - seconds of import that only this reward needs
    except ImportError as error:
        raise ImportError("the reward math_accuracy needs math-verify: pip install math-verify") from error
    from grpo_kernels.rewards import math_answers

    return math_answers


def _spell_number(text: str) -> str:
    """A number in one spelling, the text itself if it is none."""
    if not _NUMBER.fullmatch(text) or not any(map(str.isdigit, text)):
        return text
    value = Decimal(text.replace(",", ""))
    return str(value.normalize(_EXACT)) if value else "0"
