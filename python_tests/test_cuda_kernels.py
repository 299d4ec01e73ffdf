"""The small CUDA kernels, emulated on the host: scaling a gradient, advantages, ids held inside the vocabulary."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from testing.emulated import emulated
from torch import Tensor

from grpo_kernels import check_device_values, group_advantages

CPU = torch.device("cpu")
OPS = torch.ops.grpo_kernels
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("poison", "one_thread")]


@pytest.fixture(autouse=True)
def on_the_host() -> Iterator[None]:
    with emulated():
        yield


def _rows(values: Tensor, offset: int, shape: tuple[int, ...], gap: int) -> Tensor:
    """A view of ``values`` from ``offset``, of rows that lie ``gap`` elements apart."""
    width = shape[-1] + gap
    count = torch.Size(shape[:-1]).numel()
    return values[offset : offset + count * width].view(*shape[:-1], width)[..., : shape[-1]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("gap", "offset"), [(0, 0), (0, 3), (5, 0), (5, 1), (16, 0)])
@pytest.mark.parametrize("shape", [(1,), (5000,), (3, 7), (2, 3, 1031), (2, 8192)], ids=str)
def test_scale_writes_the_rows_and_nothing_else(shape: tuple, gap: int, offset: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    memory = torch.randn(2 * torch.Size(shape).numel() + 100).to(dtype)
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    for factor in (torch.tensor(0.37), torch.tensor(-3.0, dtype=torch.float64), torch.tensor(1.0)):
        expected = memory.clone()
        rows = _rows(expected, offset, shape, gap)
        rows.copy_(rows.to(arithmetic) * factor.to(arithmetic))
        OPS.scale_cuda(_rows(memory, offset, shape, gap), factor)
        assert torch.equal(memory, expected)


def test_scale_refuses_a_factor_of_another_dtype() -> None:
    with pytest.raises(RuntimeError, match="expected another dtype"):
        OPS.scale_cuda(torch.ones(3), torch.tensor(2.0, dtype=torch.bfloat16))
    OPS.scale_cuda(torch.ones(0), torch.tensor(2.0))  # nothing to do


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("batch", "size"), [(12, 4), (6, 1), (300, 300), (600, 2)])
@pytest.mark.parametrize("functions", [1, 3])
def test_advantages_are_those_of_the_cpu(batch: int, size: int, functions: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rewards = torch.randn(batch, functions, dtype=dtype)
    rewards[torch.rand(batch, functions) < 0.2] = float("nan")
    rewards[0] = float("nan")
    if size < batch:
        rewards[-size:] = 0.1  # a group without a difference
    weights = torch.rand(functions, dtype=dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    for scale, aggregation in itertools.product(
        ("group", "batch", "none"), ("sum_then_normalize", "normalize_then_sum")
    ):
        options = {"scale_rewards": scale, "aggregation": aggregation, "reward_weights": weights}
        got, expected = (group_advantages(rewards, size, **options, backend=name) for name in ("cuda", "cpu"))
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
        assert got[0] == 0 and (size == batch or (got[-size:] == 0).all())


@pytest.mark.parametrize("infinity", [float("inf"), float("-inf")])
def test_an_infinite_reward_is_told(infinity: float) -> None:
    rewards = torch.tensor([[1.0], [2.0], [3.0], [infinity]])
    got = OPS.group_advantages_cuda(rewards, torch.ones(1), 2, 0, 0, 1e-4)
    assert got[0] == -got[1] != 0 and got[2:].tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"was given an infinite reward, at 3$"):
        check_device_values(CPU)


def test_ids_are_clamped_and_the_first_outside_is_reported() -> None:
    ids = torch.tensor([1, -3, 99, 4, 99] * 200)
    mask = torch.tensor([True, False, True, True, False] * 200)
    assert OPS.clamp_ids_cuda(ids, mask, 50).tolist() == [1, 0, 49, 4, 0] * 200
    with pytest.raises(ValueError, match=r"an id outside the vocabulary where unmasked, at 2$"):
        check_device_values(CPU)
    assert OPS.clamp_ids_cuda(ids, None, 50).tolist() == [1, 0, 49, 4, 49] * 200
    with pytest.raises(ValueError, match=r"at 1$"):
        check_device_values(CPU)
    assert OPS.clamp_ids_cuda(ids[:0], None, 50).shape == (0,)
