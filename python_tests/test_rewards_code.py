"""The program that is read out of a completion: every case of a table, and what no table holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from grpo_kernels.rewards import extract_program

CASES = yaml.safe_load((Path(__file__).parent / "reward_cases" / "code.yaml").read_text(encoding="utf-8"))


def test_cases_have_names_of_their_own():
    assert len({case["name"] for case in CASES}) == len(CASES) > 50


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_a_program_is_read_out_of_a_completion(case):
    assert extract_program(case["completion"]) == case["program"]


def test_messages_are_read_as_their_text():
    messages = [{"role": "assistant", "content": "```py\nx = 1\n```"}, {"role": "tool", "content": "```py\nx = 2\n```"}]
    assert extract_program(messages) == "x = 1"


def test_the_last_of_very_many_blocks_are_looked_at():
    program, output = "```python\ndef f():\n    return 1\n```\n", "```python\n[1]\n```\n"
    assert extract_program(program + output * 999) == "def f():\n    return 1"
    assert extract_program(program + output * 1000) == "[1]"
