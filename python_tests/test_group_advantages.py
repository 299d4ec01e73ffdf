"""``group_advantages``: backends against the fp64 reference, missing rewards, layouts, memory."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from testing.assertions import assert_near_baseline
from testing.calls import BACKENDS
from torch import Tensor

from grpo_kernels import group_advantages

pytestmark = pytest.mark.usefixtures("poison")
KERNELS = [backend for backend in BACKENDS if backend != "torch"]
NAN = float("nan")
REWARDS: dict[str, Tensor] = {
    "plain": torch.tensor([0.5, 1.0, -2.0, 0.25, 3.0, 3.0, 1.0, 0.0]),
    "equal_groups": torch.tensor([0.1, 0.1, 0.1, 0.1, 0.7, 0.7, 0.7, 0.7]),
    "one_equal_group": torch.tensor([0.1, 0.1, 0.1, 0.1, 0.7, 0.6, 0.7, 0.7]),
    "missing": torch.tensor([NAN, 1.0, -2.0, 0.25, NAN, NAN, NAN, 2.0]),
    "none": torch.full((8,), NAN),
    "large_offset": torch.tensor([0.5, 1.0, -2.0, 0.25, 3.0, 3.0, 1.0, 0.0]) + 4096,
    "two_functions": torch.tensor([0.5, 1.0, -2.0, 0.25, 3.0, 3.0, 1.0, 0.0]).repeat(2).view(8, 2) ** 2,
    "two_missing": torch.tensor([[NAN, 1.0], [NAN, NAN], [1.0, NAN], [2.0, 2.0]]).repeat(2, 1),
    "strided": torch.full((8, 3), NAN)[:, 1],
    "strided_table": torch.full((10, 5), NAN)[1:9, 1:3],
}
REWARDS["strided"].copy_(REWARDS["plain"])
REWARDS["strided_table"].copy_(REWARDS["two_functions"])
OPTIONS = list(
    itertools.product((1, 2, 4, 8), ("group", "batch", "none"), ("sum_then_normalize", "normalize_then_sum"))
)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, *(pytest.param(x, marks=pytest.mark.full) for x in (torch.bfloat16, torch.float16, torch.float64))],
    ids=str,
)
@pytest.mark.parametrize("name", REWARDS)
def test_backend_is_near_its_fp64_baseline(name: str, dtype: torch.dtype, backend: str) -> None:
    rewards = REWARDS[name].to(dtype)
    before = rewards.clone()
    for size, scale_rewards, aggregation in OPTIONS:
        options = {"scale_rewards": scale_rewards, "aggregation": aggregation}
        if rewards.dim() == 2:
            options["reward_weights"] = torch.tensor([1.0, 0.5])
        results = [
            {"advantages": group_advantages(values, size, **options, backend=which)}
            for values, which in ((rewards, backend), (rewards, "torch"), (rewards.double(), "torch"))
        ]
        assert_near_baseline(*results, dtype)
    assert torch.equal(rewards.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_missing_reward_leaves_no_trace(backend: str) -> None:
    got = group_advantages(torch.tensor([1.0, NAN, 3.0, 4.0]), 4, backend=backend)
    alone = group_advantages(torch.tensor([1.0, 3.0, 4.0]), 3, backend=backend)
    assert got[1] == 0
    torch.testing.assert_close(got[[0, 2, 3]], alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_are_independent(backend: str) -> None:
    rewards = REWARDS["plain"]
    halves = [group_advantages(part, 4, backend=backend) for part in rewards.split(4)]
    assert torch.equal(group_advantages(rewards, 4, backend=backend), torch.cat(halves))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_reaches_the_rewards(backend: str) -> None:
    assert not group_advantages(torch.ones(4, requires_grad=True) * 2, 2, backend=backend).requires_grad


#: Two groups of three, the second with a reward missing, and one whose rewards are all equal.
SCORES = torch.tensor([1.0, 0.0, 2.0, 4.0, NAN, 1.0, 5.0, 5.0, 5.0], dtype=torch.float64)
LENGTHS = torch.tensor([1, 2, 3, 3, 7, 1, 1, 2, 3])
BY_HAND = {
    "dr_grpo": [0, -1, 1, 1.5, 0, -1.5, 0, 0, 0],
    "rloo": [0, -1.5, 1.5, 3, 0, -3, 0, 0, 0],
    "gpg": [0, -8 / 7, 8 / 7, 12 / 7, 0, -12 / 7, 0, 0, 0],
    "passk": [0, 0, 1, 3 / math.sqrt(4.5), 0, 0, 0, 0, 0],
    "opo": [1 - 7 / 6, -7 / 6, 2 - 7 / 6, 4 - 13 / 4, 0, 1 - 13 / 4, 0, 0, 0],
    "remax": [0.5, -0.5, 1.5, 5, 0, 2, 0, 0, 0],
}


@pytest.mark.parametrize("name", BY_HAND)
def test_estimators_by_hand(name: str) -> None:
    options = {"opo": {"completion_lengths": LENGTHS}, "passk": {"eps": 0.0}}.get(name, {})
    if name == "remax":
        options = {"baseline_rewards": torch.tensor([0.5, -1.0, 5.0], dtype=torch.float64)}
    got = group_advantages(SCORES, 3, estimator=name, **options)
    torch.testing.assert_close(got, torch.tensor(BY_HAND[name], dtype=torch.float64), rtol=1e-12, atol=1e-15)


def test_whitened_advantages_count_a_completion_once_a_token() -> None:
    got = group_advantages(SCORES, 3, estimator="reinforce++", completion_lengths=LENGTHS)
    present = ~SCORES.isnan()
    tokens = SCORES[present].repeat_interleave(LENGTHS[present])
    torch.testing.assert_close(got[present], (SCORES[present] - tokens.mean()) / tokens.std(), rtol=1e-7, atol=1e-9)
    assert got[~present] == 0
    same = group_advantages(torch.full((4,), 0.1), 2, estimator="reinforce++", completion_lengths=torch.ones(4))
    assert torch.equal(same, torch.zeros(4))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"estimator": "a2c"}, ("estimator", "'rloo'", "'a2c'")),
        ({"estimator": "opo"}, ("completion_lengths", "must be given", "opo")),
        ({"completion_lengths": torch.ones(4)}, ("completion_lengths", "must be None", "grpo")),
        ({"estimator": "opo", "completion_lengths": torch.ones(3)}, ("completion_lengths", "[4]", "[3]")),
        ({"estimator": "remax"}, ("baseline_rewards", "must be given", "remax")),
        ({"estimator": "remax", "baseline_rewards": torch.ones(4)}, ("baseline_rewards", "[2]", "[4]")),
        ({"estimator": "rloo", "scale_rewards": "none"}, ("scale_rewards", "rloo", "'none'")),
        ({"estimator": "gpg", "aggregation": "normalize_then_sum"}, ("aggregation", "gpg", "'normalize_then_sum'")),
        ({"estimator": "passk", "num_generations": 1}, ("num_generations", "at least 2", "passk")),
    ],
    ids=str,
)
def test_options_of_estimators_are_named(options: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        group_advantages(torch.arange(4.0), **{"num_generations": 2, **options})
    assert all(part in str(caught.value) for part in parts), caught.value


def test_an_estimator_without_kernels_says_so() -> None:
    with pytest.raises(RuntimeError, match="'cpu' cannot run group_advantages: 'rloo'"):
        group_advantages(torch.arange(4.0), 2, estimator="rloo", backend="cpu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_a_group_of_equal_rewards_has_no_advantage_at_all(aggregation: str, backend: str) -> None:
    """Exactly none, beside groups that have one: of any functions and weights, in any layout, some rewards missing."""
    generator = torch.Generator().manual_seed(0)
    for trial in range(6):
        functions, size = 1 + trial % 5, 2 + trial % 7
        rewards = torch.rand(3, 1, functions, generator=generator).repeat(1, size, 1)
        rewards[0] = torch.rand(size, functions, generator=generator)
        rewards[2, :, 1:2] = NAN
        rewards[1, 0] = NAN
        rewards = rewards.view(3 * size, functions)
        weights = torch.rand(functions, generator=generator)
        for table in (rewards, rewards.t().contiguous().t())[: 2 - trial % 2]:
            for scale_rewards in ("group", "batch", "none"):
                got = group_advantages(
                    table, size, scale_rewards=scale_rewards, reward_weights=weights, aggregation=aggregation,
                    backend=backend,
                ).view(3, size)  # fmt: skip
                assert torch.equal(got[1:], torch.zeros(2, size)) and (got[0] != 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_parts_in_another_order_are_the_same_reward(backend: str) -> None:
    """Added up one after the other in fp32, 0.1 + 0.2 + 0.3 and 0.3 + 0.2 + 0.1 differ."""
    parts = torch.tensor([0.1, 0.2, 0.3, 0.7])
    table = torch.stack([parts[list(order)] for order in itertools.permutations(range(4))])
    for weight in (1.0, 0.3):
        got = group_advantages(table, 24, reward_weights=torch.full((4,), weight), backend=backend)
        assert torch.equal(got, torch.zeros(24))
