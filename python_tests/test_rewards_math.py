"""Answers read out of completions and compared, by the table in reward_cases/math.yaml and by hand."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import yaml

from grpo_kernels import rewards
from grpo_kernels.rewards.answers import EXTRACTS, math_answer

CASES = yaml.safe_load((Path(__file__).parent / "reward_cases/math.yaml").read_text())
EVIL = [
    "9^{9^{9^9}}",
    "2^{99999999}",
    "99999999!",
    r"\binom{999999999}{99999999}",
    "1e99999999",
    "(" * 500,
    "x^{x^{x^x}}",
]
EVIL += [
    r"\sum_{k=1}^{99999999} \frac{1}{k^2}",
    r"\sum_{k=1}^{\infty} 2^k",
    "(2, 9^{9^{9^9}})",
    "9!!!!",
    r"\frac{1}{9^{99999}} + \sqrt{2}",
    "a" * 10**5,
]


def judged(reward, completion, answer):
    return reward(prompts=[""], completions=[completion], completion_ids=[[0]], answer=[answer])[0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.get("given", case.get("completion")))[:40])
def test_the_table_of_answers_holds(case):
    assert case.keys() <= {"given", "completion", "answer", "right", "why"}
    completion = case.get("completion") or f"<answer>{case['given']}</answer>"
    assert judged(rewards.math_accuracy_reward, completion, case["answer"]) == float(case["right"])


def test_the_table_has_right_and_wrong_answers():
    right = sum(case["right"] for case in CASES)
    assert len(CASES) >= 80 and right >= len(CASES) / 3 and len(CASES) - right >= len(CASES) / 3


@pytest.mark.parametrize("answer", EVIL)
def test_what_is_too_large_to_work_out_is_wrong_at_once_in_any_thread(answer):
    found = []

    def judge():
        found.append(judged(rewards.math_accuracy_reward, f"<answer>{answer}</answer>", "42"))
        found.append(judged(rewards.math_accuracy_reward, "<answer>42</answer>", f"${answer}$"))
        math_answer(f"<answer>{answer}</answer>")

    start = time.perf_counter()
    worker = threading.Thread(target=judge, daemon=True)
    worker.start()
    worker.join(20)
    assert found[0] == 0.0 and found[1] in (0.0, None) and time.perf_counter() - start < 10


@pytest.mark.parametrize(
    "spelled",
    [
        ["1/2", "0.5", r"$\frac{2}{4}$", "**.50**", "½", "0.5 km"],
        [r"3\sqrt{2}", r"\sqrt{18}", r"\frac{6}{\sqrt2}"],
        ["x^2+2x+1", "(x+1)^2", "1 + x(x + 2)"],
        [r"\{1, 2\}", "2, 1", "x = 1 or x = 2"],
        ["(1, 2]", r"x \in (1,2]", r"1 < x \le 2"],
        ["x < 3", "3 > x"],
        ["Yes", "**yes**.", r"\text{yes}"],
        ["B", "(B)", "The answer is B.", "b"],
    ],
)
def test_answers_that_are_equal_vote_together(spelled):
    votes = {math_answer(f"<answer>{text}</answer>") for text in spelled}
    assert len(votes) == 1 and None not in votes
    for text in spelled:
        assert judged(rewards.math_accuracy_reward, f"<answer>{text}</answer>", spelled[0]) == 1.0


@pytest.mark.parametrize(
    "text", ["4 @", "3 4", r"4 \foo", "3 apples and 4 pears", "42 or more", r"1, 2, \ldots, n", ""]
)
def test_what_was_not_read_to_its_end_has_no_vote(text):
    assert math_answer(f"<answer>{text}</answer>") is None


def test_a_vote_is_for_the_last_candidate_alone():
    assert math_answer("It may be 3.") is None
    assert math_answer([{"role": "assistant", "content": "<answer>3</answer> <answer>4</answer>"}]) == "4"


@pytest.mark.parametrize(
    ("given", "answer", "right"),
    [
        ("5", 5, 1.0),
        ("5.0", "5", 1.0),
        ("5", 5.0, 1.0),
        ("05", "5", 1.0),
        ("+5", "5", 1.0),
        ("5e0", "5", 1.0),
        ("1,000", 1000, 1.0),
        ("1000", "1,000", 1.0),
        ("-0", "0", 1.0),
        ("0.1", 0.1, 1.0),
        ("1e400", "10e399", 1.0),
        ("1,00", "100", 0.0),
        ("5.0.0", "5", 0.0),
        ("-5", "5", 0.0),
        ("1/2", "0.5", 0.0),
        ("**5**", "5", 0.0),
        ("12345678901234567891", "12345678901234567890", 0.0),
        ("1e999999", "1e999998", 0.0),
        (" the\n result", "the result", 1.0),
        ("The result", "the result", 0.0),
        (".", ".", 1.0),
        ("", "0", 0.0),
        ("", "", 1.0),
    ],
)
def test_accuracy_compares_numbers_by_value_and_text_up_to_white_space(given, answer, right):
    completion = f"<think>so</think><answer>{given}</answer>"
    assert judged(rewards.accuracy_reward, completion, answer) == right
    vote = EXTRACTS[rewards.accuracy_reward]
    assert (vote(completion) == vote(f"<answer>{answer}</answer>")) == (right == 1.0)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("I put it in <answer> tags: <answer>4</answer>", "4"),
        ("<answer>3</answer> no, <answer>4</answer>", "4"),
        ("<answer>4</answer> and <answer>5", "4"),
        ("<answer>3 <answer>4</answer> 5</answer>", "4"),
        ("<think>maybe <answer>4</answer>", "4"),
        ("<think>maybe <answer>4</answer></think>\n", "4"),
        ("<think>maybe <answer>4</answer></think> No.", None),
        ("<answer>4", None),
        ("4</answer>", None),
        ([{"role": "assistant", "content": "<answer> 4 </answer>"}], "4"),
    ],
)
def test_the_last_complete_answer_element_counts(completion, answer):
    assert rewards.extract_answer(completion) == answer


@pytest.mark.parametrize("reward", [rewards.accuracy_reward, rewards.math_accuracy_reward, rewards.exact_match_reward])
def test_completions_may_be_messages(reward):
    text = "4" if reward is rewards.exact_match_reward else "<answer>4</answer>"
    for answer, right in (("4", 1.0), ("5", 0.0)):
        assert judged(reward, [{"role": "assistant", "content": text}], answer) == right
