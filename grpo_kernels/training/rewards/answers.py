"""Rewards for the right answer: equal text, or equal as mathematics."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_DELIMITED = re.compile(r"\$|\\\(|\\\[|\\boxed")
_COMMAND = re.compile(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}|\\[A-Za-z]+")
_WORD = re.compile(r"[^\W\d_]{3,}")
_SECONDS = 5  # what math-verify may take for one text or one comparison


def extract_answer(completion: str) -> str | None:
    """The text of the last ``<answer>`` element without its white space, or None if there is none."""
    answers = _ANSWER.findall(completion)
    return "".join(answers[-1].split()) if answers else None


def accuracy_reward(
    prompts: Sequence[Any], completions: Sequence[str], *, answer: Sequence[Any], **columns: Any
) -> list[float]:
    """1 where the completion's answer equals the ``answer`` column up to white space, else 0."""
    expected = ["".join(str(a).split()) for a in answer]
    return [float(extract_answer(c) == e) for c, e in zip(completions, expected, strict=True)]


def exact_match_reward(
    prompts: Sequence[Any], completions: Sequence[str], *, answer: Sequence[Any], **columns: Any
) -> list[float]:
    """1 where the whole completion equals the ``answer`` column up to white space around it, else 0."""
    return [float(c.strip() == str(a).strip()) for c, a in zip(completions, answer, strict=True)]


def math_accuracy_reward(
    prompts: Sequence[Any], completions: Sequence[str], *, answer: Sequence[Any], **columns: Any
) -> list[float | None]:
    """1 where the completion's answer equals the ``answer`` column as mathematics, else 0; by math-verify.

    The column holds LaTeX, with or without dollars or a ``\\boxed``, a plain number, or a solution that ends in
    ``#### 42``, as GSM8K's do. Where nothing in it can be parsed (a word, an empty text, None) the reward abstains.

    The completion's answer is its last ``<answer>`` element, else what follows its last ``####``, both read as the
    column is; else the last formula in LaTeX after ``</think>``, a ``\\boxed`` before one that the word answer
    announces, and that before others. A plain number in running text is no answer.

    Parsing and comparing may take 5 seconds each, after which an answer is wrong and a column unparsable. math-verify
    measures that by a signal, which Python delivers to the main thread alone: in another thread there is no limit.

    Raises:
        ImportError: math-verify is not installed.
    """
    try:
        import math_verify  # seconds of import that only this reward needs
    except ImportError as error:
        raise ImportError("the reward math_accuracy needs math-verify: pip install math-verify") from error
    seconds = _SECONDS if threading.current_thread() is threading.main_thread() else None
    rewards: list[float | None] = []
    for completion, expected in zip(completions, answer, strict=True):
        gold = _parse_formula(_after_hashes("" if expected is None else str(expected)), seconds)
        if not gold:
            rewards.append(None)
            continue
        rewards.append(float(math_verify.verify(gold, _parse_completion(completion, seconds), timeout_seconds=seconds)))
    return rewards


JUDGES = {
    "accuracy": accuracy_reward,
    "exact_match": exact_match_reward,
    "math_accuracy": math_accuracy_reward,
}


def math_answer(completion: str) -> str | None:
    """A completion's answer as ``math_accuracy_reward`` reads it, in one spelling of the formula; None without one."""
    seconds = _SECONDS if threading.current_thread() is threading.main_thread() else None
    found = _parse_completion(completion, seconds)
    return str(found[0]) if found else None


#: By judge, what reads a completion's answer, for votes. A judge of one's own has it as its attribute ``extract``.
EXTRACTS: dict[Callable[..., Any], Callable[[str], str | None]] = {
    accuracy_reward: extract_answer,
    exact_match_reward: str.strip,
    math_accuracy_reward: math_answer,
}


def extract_of(judge: Callable[..., Any]) -> Callable[[str], str | None] | None:
    """What reads the answer that a judge judges; None where it judges no answer that could be voted on."""
    known = next((extract for function, extract in EXTRACTS.items() if function is judge), None)
    return getattr(judge, "extract", known)


def judge_name(reward_funcs: Sequence[str]) -> str:
    """The first of them that judges answers or programs, else "accuracy"."""
    return next((name for name in reward_funcs if name.partition("(")[0].strip() in (*JUDGES, "code")), "accuracy")


def _after_hashes(text: str) -> str:
    """What stands between the last ``####`` and the end of its line; the whole text if there is none."""
    _, hashes, answer = text.rpartition("####")
    return answer.strip().partition("\n")[0] if hashes else text


def _parse_completion(completion: str, seconds: int | None) -> list[Any]:
    import math_verify

    answers = _ANSWER.findall(completion)
    if answers:
        return _parse_formula(_after_hashes(answers[-1]), seconds)
    if "####" in completion:
        return _parse_formula(_after_hashes(completion), seconds)
    config = math_verify.LatexExtractionConfig(boxed_match_priority=0)
    return math_verify.parse(
        completion.rpartition("</think>")[2],
        extraction_config=[config],
        extraction_mode="first_match",
        fallback_mode="no_fallback",
        parsing_timeout=seconds,
    )


def _parse_formula(text: str, seconds: int | None) -> list[Any]:
    """A text that is an answer, parsed; empty if it cannot be.

    Without delimiters it is a formula as a whole, unless it has words outside LaTeX commands: then the last formula or
    number in it counts, as in "42 apples".
    """
    import math_verify

    text = text.strip()
    is_formula = text and not _DELIMITED.search(text) and not _WORD.search(_COMMAND.sub(" ", text))
    return math_verify.parse(f"${text}$" if is_formula else text, fallback_mode="no_fallback", parsing_timeout=seconds)
