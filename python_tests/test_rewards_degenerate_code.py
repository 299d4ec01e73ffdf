"""Texts of one piece over and over are searched for a program in time linear in their length, in any thread."""

from __future__ import annotations

import pytest
from testing.threads import seconds_in_a_thread

from grpo_kernels.rewards import RepetitionReward, extract_program, format_reward

PIECES = [
    "`", "```\n", "``` ", "```x", "```python\n", "```python\nx = 1\n```\n", "```python\n'''", "```python\n'''\n```\n",
    "```python print(1)```", "```pythondef f():\n", "```py\n```\n[1]\n", "```\nx ```", "~~~ ", "~~~\n", "``` ~~~ ",
    "a```py\n",
    "Code:```py\nx\n```\n", "````markdown\n", "```markdown\n```py\n", "```py\ndef f(): f()\n```\n", "# ```\n",
    "# ```python\nx\n# ```\n", "#```py\n", "```py\n#```\n~~~\n", "```py\n(\n'```'\n", "```py\n# <answer>\n",
    "<answer>", "</answer>", "<answer>1</answer>", "```py\n<answer>\n", "<think>", "</think>", "[THINK]",
    "assistantfinal", "[PYTHON]", "[PYTHON]\n", "[PYTHON]\n[/PYTHON]\n", "<|python_tag|>", "```py\nclass A:\n pass\n",
    "<|im_end|>", "<|a|>\n", "<|", "<eos> ", "```py\n<|im_end|>\n", "<a>", "<", "'", '"', "'''", '"""', "\\", "\\'",
    "\\'''", "\\\n", "'\\", "> ", ">\n", "> ```\n", "> ```py\n> x\n", "- ", "- a\n", "1. ", "1```\n", "\t", " ", "\n",
    "\0",
    "def f():\n \n",
    "#", "(", "[", "-", "not ", "a.", "1+", "lambda:", "x = 1\n", "def f():\n", "python\n", "a b ", "\u0301", "\ud800",
]  # fmt: skip
LENGTH = 100_000  # characters
SECONDS = 1.5  # of the thread's own time; it takes half of one at most, and what is quadratic takes minutes


@pytest.mark.parametrize("piece", PIECES, ids=ascii)
def test_no_repetition_is_a_long_search_for_a_program(piece: str) -> None:
    text = piece * (LENGTH // len(piece))
    for completion in (text, f"<answer>```python\nx = 1\n{text}"):
        assert seconds_in_a_thread(extract_program, completion) < SECONDS, completion[:20]


def test_many_programs_that_seem_to_go_on_are_not_all_read_to_the_end() -> None:
    """Each block ends in a comment, so that all which follows could be part of it."""
    text = "# ```python\nx = (\n# ```\n" * (4 * LENGTH // 24)
    assert seconds_in_a_thread(extract_program, text) < 4 * SECONDS


def test_many_programs_behind_a_long_one_are_not_long_to_look_for_in_it() -> None:
    long = "print(1)\n" * 5000
    text = f"```py\n{long}```\n" + f"```py\n{'print(1)' * 2}\n```\n```py\n{long[:81]}print(2)\n```\n" * 500
    assert seconds_in_a_thread(extract_program, text) < SECONDS


@pytest.mark.parametrize(
    "piece", ["\u0301", "a\u0301", "\ud800", "中", "中\u0301", "<think>", "<think>a", "</think>", " "], ids=ascii
)
def test_no_repetition_is_long_to_count_or_to_match(piece: str) -> None:
    text = piece * (LENGTH // len(piece))
    for reward in (format_reward, RepetitionReward(), RepetitionReward(unit="characters")):
        assert seconds_in_a_thread(reward, ["p"], [f"<think>{text}</think><answer>{text}</answer>"]) < SECONDS, reward
