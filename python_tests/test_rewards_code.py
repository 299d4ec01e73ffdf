"""The program that is read out of a completion: every case of a table, and what no table holds."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import yaml

from grpo_kernels.training.rewards import code, extract_program

CASES = yaml.safe_load((Path(__file__).parent / "reward_cases" / "code.yaml").read_text(encoding="utf-8"))


def test_cases_have_names_of_their_own():
    assert len({case["name"] for case in CASES}) == len(CASES) > 50


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_a_program_is_read_out_of_a_completion(case):
    assert extract_program(case["completion"]) == case["program"]


def test_messages_are_read_as_their_text():
    messages = [{"role": "assistant", "content": "```py\nx = 1\n```"}, {"role": "tool", "content": "```py\nx = 2\n```"}]
    assert extract_program(messages) == "x = 1"


@pytest.mark.parametrize(
    "completion",
    ["```python\nx = 1\n" * 2000, "```\n" * 5000, "<answer>" * 4000, "```python\n'" + "<answer>" * 4000, ">" * 20000,
     "- " * 20000, "`" * 40000, "```python\n" + "'" * 30001, "```py\n" + "x = 1```\n" * 4000, "\\" * 20001,
     "<answer>" + "a" * 40000, "```\n<answer>\n" * 3000],
    ids=lambda completion: repr(completion[:16]),
)  # fmt: skip
def test_a_model_gone_wild_is_read_in_a_moment(completion):
    start = time.perf_counter()
    extract_program(completion)
    assert time.perf_counter() - start < 10


def test_a_missing_parser_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "markdown_it", None)
    code._markdown.cache_clear()
    with pytest.raises(ImportError, match="pip install markdown-it-py"):
        extract_program("```\nx = 1\n```")
    monkeypatch.undo()
    assert extract_program("```\nx = 1\n```") == "x = 1"
