"""Calling rewards: by name and together, and what is refused."""

from __future__ import annotations

import asyncio
import fractions
import math
import pickle
import sys
import threading

import numpy as np
import pytest
import torch

from grpo_kernels import rewards
from grpo_kernels.rewards import OverlongReward, RepetitionReward


@rewards.reward_factory
def constant(value):
    return lambda prompts, completions, **columns: [value] * len(completions)


@rewards.reward_factory
def fraction():
    return fractions.Fraction(1)


async def slow_reward(prompts, completions, *, level, **columns):
    await asyncio.sleep(0)
    return [None if x else 1.0 for x in level]


class SlowLength:
    async def __call__(self, prompts, completions, **columns):
        return [len(c) for c in completions]


def test_synchronous_and_asynchronous_rewards_fill_their_columns():
    functions = {"slow": slow_reward, "format": rewards.format_reward, "length": SlowLength()}
    table = rewards.score(functions, ["p"] * 2, ["ab", "abc"], {"level": [0, 1]})
    torch.testing.assert_close(table, torch.tensor([[1.0, 0.0, 2.0], [math.nan, 0.0, 3.0]]), equal_nan=True)


def test_a_total_is_weighted_and_an_abstention_counts_for_nothing():
    table = torch.tensor([[2.0, 1.0], [3.0, math.nan]])
    assert rewards.total(table, [0.5, 4.0]).tolist() == [5.0, 1.5]
    assert rewards.total(table, None).tolist() == [3.0, 3.0]
    assert rewards.total(torch.tensor([[math.nan, math.nan]]), None).isnan().all()


def test_asynchronous_rewards_run_together():
    async def first(prompts, completions, **columns):
        await asyncio.wait_for(opened().wait(), 10)  # in turn, it would wait in vain
        return [1.0]

    async def second(prompts, completions, **columns):
        opened().set()
        return [2.0]

    gates = {}

    def opened():  # an event belongs to the loop that it is made in
        return gates.setdefault("gate", asyncio.Event())

    assert rewards.score({"first": first, "second": second}, ["p"], ["c"], {}).tolist() == [[1.0, 2.0]]


def test_rewards_can_be_called_where_an_event_loop_runs():
    threads = []

    def here(prompts, completions, **columns):
        threads.append(threading.current_thread())
        return [0.5]

    async def trainer():
        return rewards.score({"here": here, "length": SlowLength()}, ["p"], ["abc"], {})

    assert asyncio.run(trainer()).tolist() == [[0.5, 3.0]]
    assert threads == [threading.main_thread()]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.filterwarnings("error")  # such as: a coroutine was never awaited
def test_a_reward_that_raises_is_named_with_its_exception_as_the_cause(asynchronous):
    def broken(prompts, completions, **columns):
        raise KeyError("verifier")

    async def slowly_broken(prompts, completions, **columns):
        raise KeyError("verifier")

    function = slowly_broken if asynchronous else broken
    with pytest.raises(RuntimeError, match="'mine' failed on 3 completions: KeyError: 'verifier'") as caught:
        rewards.score({"slow": slow_reward, "mine": function}, ["p"] * 3, ["c"] * 3, {"level": [0, 0, 0]})
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_missing_column_is_named():
    with pytest.raises(RuntimeError, match=r"'accuracy' failed on 1 completions: TypeError: .*'answer'"):
        rewards.score({"accuracy": rewards.accuracy_reward}, ["p"], ["c"], {})


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        ([1.0], ValueError, "'mine' must return 2 rewards, got 1"),
        ([1.0, 2.0, 3.0], ValueError, "'mine' must return 2 rewards, got 3"),
        ([0.0, math.nan], ValueError, "'mine' must return finite rewards, got nan for completion 1; None abstains"),
        (torch.tensor([math.nan, 0.0]), ValueError, "got nan for completion 0"),
        ([0.0, math.inf], ValueError, "'mine' must return finite rewards, got inf for completion 1"),
        ([-math.inf, 0.0], ValueError, "'mine' must return finite rewards, got -inf for completion 0"),
        ([0.0, 1e39], ValueError, r"'mine' must return finite rewards, got 1e\+39 for completion 1"),
        ([0.0, 10**400], ValueError, "'mine' must return finite rewards, got 1000"),
        ([0.0, "1"], TypeError, "'mine' must return numbers or None, got str '1' for completion 1"),
        ([[1.0], 0.0], TypeError, r"'mine' must return numbers or None, got list \[1.0\] for completion 0"),
        (torch.zeros(2, 1), TypeError, "got list"),
        ([1j, 0.0], TypeError, "got complex 1j"),
        ("ab", TypeError, "'mine' must return a list of rewards, got str"),
        ({0: 1.0, 1: 2.0}, TypeError, "'mine' must return a list of rewards, got dict"),
        (1.0, TypeError, "'mine' must return a list of rewards, got float"),
        (torch.tensor(1.0), TypeError, "'mine' must return a list of rewards, got float"),
        (None, TypeError, "'mine' must return a list of rewards, got NoneType"),
    ],
)
def test_what_is_no_list_of_rewards_is_refused(returned, error, message):
    with pytest.raises(error, match=message):
        rewards.score({"mine": lambda prompts, completions, **columns: returned}, ["p"] * 2, ["c"] * 2, {})


@pytest.mark.parametrize(
    "returned",
    [
        [True, None, 2],
        (np.float32(1), None, np.int64(2)),
        [torch.tensor(1.0), None, torch.tensor(2, dtype=torch.bfloat16)],
        [np.bool_(True), None, fractions.Fraction(2)],
    ],
)
def test_numbers_of_every_kind_are_rewards(returned):
    table = rewards.score({"mine": lambda prompts, completions, **columns: returned}, ["p"] * 3, ["c"] * 3, {})
    torch.testing.assert_close(table, torch.tensor([[1.0], [math.nan], [2.0]]), equal_nan=True)


def test_arrays_and_tensors_are_rewards():
    functions = {
        "array": lambda prompts, completions, **columns: np.array([1, 2]),
        "tensor": lambda prompts, completions, **columns: torch.tensor([0.5, -1.0]),
    }
    assert rewards.score(functions, ["p"] * 2, ["c"] * 2, {}).tolist() == [[1.0, 0.5], [2.0, -1.0]]


def test_rewards_take_their_parameters_from_their_name():
    assert rewards.resolve("accuracy") is rewards.accuracy_reward
    assert rewards.resolve("grpo_kernels.rewards:format_reward") is rewards.format_reward
    assert rewards.resolve("repetition") == RepetitionReward()
    assert rewards.resolve("repetition()") == RepetitionReward()
    assert rewards.resolve(" repetition(n=2, max_penalty=-0.5) ") == RepetitionReward(n=2, max_penalty=-0.5)
    assert rewards.resolve("overlong(max_completion_len=10, soft_punish_cache=4)") == OverlongReward(10, 4)
    made = rewards.resolve("language_consistency(vocabulary=['1', '(', ','])")
    assert made(["p"], ["1 , ( x"]) == [0.75]
    assert rewards.resolve("test_rewards_scoring:constant(value=2)")(["p"], ["c"]) == [2]
    assert rewards.resolve("grpo_kernels.rewards:RepetitionReward(n=1)") == RepetitionReward(n=1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("repetition(m=2)", "'repetition' has no parameter 'm'; it has n, max_penalty"),
        ("repetition(2)", r'expected "name\(key=value, ...\)" with literal values, got \'repetition\(2\)\''),
        ("repetition(**{'n': 2})", "expected"),
        ("repetition(n=2, n=3)", "expected"),
        ("repetition(n=)", "expected"),
        ("repetition(n=print(1))", "expected"),
        ("repetition(n=[].append)", "expected"),
        ("repetition(n=2)(n=3)", "expected"),
        ("repetition(n=2) + f(n=3)", "expected"),
        ("repetition(n=0)", "'repetition': n must be an integer of at least 1, got 0"),
        ("repetition(n='3')", "'repetition': n must be an integer of at least 1, got '3'"),
        ("repetition(n=True)", "n must be an integer"),
        ("repetition(max_penalty=1.0)", r"max_penalty must be in \[-inf, 0.0\], got 1.0"),
        ("overlong", "'overlong' needs max_completion_len, soft_punish_cache"),
        ("accuracy(strict=True)", "'accuracy' has no parameters"),
        ("repetitive(n=2)", r"expected one of accuracy, .*, reasoning_gym or \"module:function\", got 'repetitive'"),
        ("test_rewards_scoring:constant(values=2)", "has no parameter 'values'; it has value"),
        ("test_rewards_scoring:constant(value=len)", "expected"),
        ("test_rewards_scoring:fraction()", "must make a reward function, got Fraction"),
        ("fractions:Fraction(numerator=1)", "'fractions:Fraction' must be marked by @reward_factory"),
        ("test_rewards_scoring:SlowLength", "'test_rewards_scoring:SlowLength' must be marked by @reward_factory"),
        ("grpo_kernels.rewards:nothing", "has no function 'nothing'"),
        ("no_such_module:mine", "'no_such_module:mine' cannot be imported: No module named 'no_such_module'"),
    ],
)
def test_a_name_that_makes_no_reward_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        rewards.resolve(name)


def test_nothing_in_a_name_is_run():
    with pytest.raises(ValueError, match="literal"):
        rewards.resolve("repetition(n=__import__('sys').modules.setdefault('pwned_by_a_name', 1))")
    assert "pwned_by_a_name" not in sys.modules


def test_a_name_calls_nothing_that_is_no_factory_of_rewards(tmp_path):
    with pytest.raises(ValueError, match="'os:mkdir' must be marked by @reward_factory"):
        rewards.resolve(f"os:mkdir(path={str(tmp_path / 'made')!r})")
    assert not (tmp_path / "made").exists()


def test_every_shipped_reward_scores_an_empty_completion_and_can_be_pickled():
    parameters = {"overlong": "(max_completion_len=8, soft_punish_cache=4)"}
    columns = {"answer": ["4"], "tests": [["assert True"]], "completion_ids": [[]]}
    scores = {}
    for name in [name for name in rewards.BUILT_IN if name != "reasoning_gym"]:  # whose test has rows for it
        reward = pickle.loads(pickle.dumps(rewards.resolve(name + parameters.get(name, ""))))
        scores[name] = rewards.score({name: reward}, ["p"], [""], columns).item()
    assert math.isnan(scores["language_consistency"])  # no words, no evidence
    assert scores | {"language_consistency": 0.0} == dict.fromkeys(scores, 0.0) | {"cosine_length": -1.0}
    assert set(scores) == {
        "accuracy", "math_accuracy", "exact_match", "format", "tag_count", "language_consistency", "length",
        "cosine_length", "overlong", "repetition", "code",
    }  # fmt: skip
