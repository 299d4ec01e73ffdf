"""``group_advantages``: backends against the fp64 reference, missing rewards, layouts, memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from grpo_kernels import group_advantages
from grpo_kernels.testing.assertions import assert_near_baseline
from grpo_kernels.testing.calls import BACKENDS

pytestmark = pytest.mark.usefixtures("poison")
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
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
