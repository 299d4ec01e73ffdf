"""Completions of one piece over and over, as a policy that has collapsed writes them, cost no reward much time."""

from __future__ import annotations

import time

import pytest
from testing.threads import seconds_in_a_thread

from grpo_kernels.rewards import BUILT_IN, resolve
from grpo_kernels.rewards.answers import TimeLimit
from grpo_kernels.rewards.math_answers import read_answer
from grpo_kernels.rewards.math_formula import parse_formula

PIECES = [
    "`", "```\n", "```python\n'''", "~~~ ", "<answer>", "</answer>", "<answer>1</answer>", "<think>", "$", "$a ", "$$",
    "$1$ and ", "\\(", "\\[", "\\(1\\) ", "{", "(", "[", "9", "1,", " ", "\n", "> ", "- ", "*a", "<a ", "\\boxed{",
    "\\boxed{5} ",
    "\\boxed{5} is wrong. ", "\\boxed{5}, ", "\\frac{", "\\begin{pmatrix}", "answer ", "answer is not ",
    "#### ", "\0", "\ud800",
    "\u0301", "中", "x", "a b ", "|x|", "\\log(", "(1,2)\\cup ",
]  # fmt: skip
LENGTH = 100_000  # characters
ELSEWHERE = ("code", "language_consistency", "reasoning_gym")
SECONDS = 2.5  # less than math_accuracy's own limit; what is quadratic takes minutes


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name not in ELSEWHERE])
def test_no_repetition_takes_long(name: str) -> None:
    parameters = {"overlong": "(max_completion_len=4, soft_punish_cache=2)"}
    function = resolve(name + parameters.get(name, ""))
    columns = {"answer": ["5"], "completion_ids": [[1] * 1000]}
    function(prompts=["p"], completions=["<answer>5</answer>"], **columns)  # imports what it needs

    def judge(completion: str) -> None:
        function(prompts=["p"], completions=[completion], **columns)

    for piece in PIECES:
        text = piece * (LENGTH // len(piece))
        for completion in (text, f"<answer>{text}</answer>", f"<think>{text}</think><answer>5</answer>"):
            assert seconds_in_a_thread(judge, completion) < SECONDS, (piece, completion[:20])


@pytest.mark.parametrize("piece", PIECES)
def test_no_repetition_of_a_length_that_is_read_takes_long(piece: str) -> None:
    for length in (300, 900, 1900):
        assert seconds_in_a_thread(read_answer, piece * (length // len(piece))) < SECONDS


@pytest.mark.parametrize(
    "text", ["|x|" * 300, r"(10^{9999})^{9999}", "(" * 400 + "x" + ")" * 400, r"\sqrt[3]{2(3^{20000} + 1)}"]
)
def test_what_takes_long_to_parse_or_to_work_out_is_no_formula(text: str) -> None:
    values = [0]
    assert seconds_in_a_thread(lambda: values.append(parse_formula(text))) < 2 * SECONDS
    assert values == [0, None]


def test_blanks_between_two_boxes_take_no_long_time() -> None:
    judge, got = resolve("math_accuracy"), []
    judge(prompts=["p"], completions=["<answer>5</answer>"], answer=["5"])  # imports what it needs
    completion = rf"\boxed{{4}}{' ' * LENGTH}so \boxed{{5}}"
    took = seconds_in_a_thread(lambda: got.extend(judge(prompts=["p"], completions=[completion], answer=["5"])))
    assert took < SECONDS and got == [1.0]


def test_an_answer_of_more_than_2000_characters_is_not_read() -> None:
    assert read_answer("9" * 1999).value == int("9" * 1999)
    assert read_answer("9" * 2001).value is None


def test_a_formula_that_takes_sympy_long_is_wrong_in_any_thread() -> None:
    completion = r"<answer>" + r"\log(" * 7 + "2" + ")" * 7 + "</answer>"  # nearly a minute without a limit
    judge, got = resolve("math_accuracy"), []
    judge(prompts=["p"], completions=["<answer>5</answer>"], answer=["5"])

    def judged() -> None:
        got.extend(judge(prompts=["p"], completions=[completion], answer=["5"]))

    assert seconds_in_a_thread(judged) < 15 and got == [0.0]


def busy(seconds: float, result: str = "done") -> str:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        try:
            sum(range(100))
        except Exception:  # as sympy has it
            return "swallowed"
    return result


def failing() -> None:
    raise KeyError("mine")


@pytest.mark.parametrize("in_thread", [False, True])
def test_a_call_ends_at_its_limit_and_nothing_is_raised_later(in_thread: bool) -> None:
    outcomes: list[str] = []

    def calls() -> None:
        with TimeLimit(0.2) as limit:
            outcomes.append(limit.call(busy, 0.01))
            time.sleep(0.3)  # between calls there is none
            with pytest.raises(TimeoutError, match=r"more than 0\.2 seconds"):
                limit.call(busy, 30)
            with pytest.raises(KeyError, match="mine"):
                limit.call(failing)
        with TimeLimit(0.001) as limit:
            for _ in range(200):  # which end just as the limit does
                try:
                    outcomes.append(limit.call(busy, 0.001))
                except TimeoutError:
                    outcomes.append("late")
        outcomes.append(busy(1.2, "undisturbed"))

    if in_thread:
        assert seconds_in_a_thread(calls) < 20
    else:
        calls()
    assert outcomes[0] == "done" and outcomes[-1] == "undisturbed" and len(outcomes) == 202
    assert set(outcomes) <= {"done", "late", "undisturbed"}
