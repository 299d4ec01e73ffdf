"""A reward's module is imported when the reward is used, and no other reward's with it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from grpo_kernels import rewards
from grpo_kernels.rewards.registry import import_function

PROGRAM = """
import sys
import grpo_kernels
before = set(sys.modules)

def loaded():
    return {name.removeprefix("grpo_kernels.rewards.") for name in set(sys.modules) - before}

import grpo_kernels.rewards as rewards
assert loaded() == {"grpo_kernels.rewards", "grpo_kernels.errors", "completions", "registry"}, loaded()
rewards.resolve("format")
assert "text" in loaded() and not {"answers", "language", "length", "scoring"} & loaded(), loaded()
rewards.resolve("accuracy")
others = {"code", "language", "length", "math_answers", "reward_model", "sandbox", "scoring"}
assert "answers" in loaded() and not {*others, "lingua", "math_verify", "sympy", "transformers"} & loaded(), loaded()
rewards.score({"accuracy": rewards.accuracy_reward}, ["p"], ["c"], {"answer": ["4"]})
assert "scoring" in loaded() and "reward_model" not in loaded()
"""


def test_a_recipe_imports_the_rewards_that_it_names() -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", rewards.__all__)
def test_public_names_are_there(name: str) -> None:
    assert name in dir(rewards) and getattr(rewards, name) is not None


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match=r"module 'grpo_kernels.rewards' has no attribute 'nothing'"):
        _ = rewards.nothing


def test_built_in_rewards_are_where_the_table_says() -> None:
    for name in rewards.BUILT_IN.values():
        function = import_function(name)
        assert name == f"{function.__module__}:{function.__name__}"
