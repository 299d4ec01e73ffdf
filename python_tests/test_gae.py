"""``gae``: a hand-worked scan, the definition as a double sum, backends alike, masks, packing, bad input."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from testing.calls import BACKENDS
from torch import Tensor

from grpo_kernels import gae

pytestmark = pytest.mark.usefixtures("one_thread")
NAN = float("nan")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scan_by_hand(backend: str) -> None:
    """The second token is masked: the first is followed by the third."""
    rewards = torch.tensor([[1.0, NAN, 0.0, 2.0]])
    values = torch.tensor([[0.5, NAN, 1.0, 0.25]])
    out = gae(rewards, values, torch.tensor([[1, 0, 1, 1]]), gamma=0.5, lam=0.5, backend=backend)
    last = 2.0 - 0.25
    third = 0.0 + 0.5 * 0.25 - 1.0 + 0.25 * last
    first = 1.0 + 0.5 * 1.0 - 0.5 + 0.25 * third
    assert out.advantages.tolist() == [[first, 0.0, third, last]]
    assert out.returns.tolist() == [[first + 0.5, 0.0, third + 1.0, 2.0]]


def _by_definition(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:  # [T] each
    """``sum_l (gamma lam)^l delta_(t+l)``."""
    following = torch.cat([values[1:], values.new_zeros(1)])
    delta = rewards + gamma * following - values
    powers = (gamma * lam) ** torch.arange(len(delta), dtype=delta.dtype)
    return torch.stack([(powers[: len(delta) - t] * delta[t:]).sum() for t in range(len(delta))])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 7, 1023, 1024, 1025, 3000])
def test_the_scan_is_the_definition(length: int, dtype: torch.dtype, backend: str) -> None:
    rng = torch.Generator().manual_seed(length)
    rewards, values = (torch.randn(2, length, generator=rng).to(dtype) for _ in range(2))
    mask = torch.rand(2, length, generator=rng) < 0.7
    mask[0] = True
    dirty = (torch.where(mask, x, NAN) for x in (rewards, values))
    out = gae(*dirty, mask, gamma=0.99, lam=0.97, backend=backend)
    assert out.advantages.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    for b in range(2):
        expected = _by_definition(rewards[b][mask[b]].double(), values[b][mask[b]].double(), 0.99, 0.97)
        torch.testing.assert_close(out.advantages[b][mask[b]].double(), expected, **close)
        torch.testing.assert_close(out.returns[b][mask[b]].double(), expected + values[b][mask[b]].double(), **close)
        assert not out.advantages[b][~mask[b]].any() and not out.returns[b][~mask[b]].any()


@pytest.mark.parametrize("backend", BACKENDS)
@hypothesis.given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(sum), seed=st.integers(0, 999))
def test_packed_completions_are_those_of_rows(backend: str, lengths: list[int], seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    rewards, values = (torch.randn(len(lengths), 5, generator=rng).double() for _ in range(2))
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = gae(rewards[mask], values[mask], torch.ones(sum(lengths)), cu_seqlens=offsets, backend=backend)
    for got, want in zip(packed, gae(rewards, values, mask, backend="torch"), strict=True):
        torch.testing.assert_close(got, want[mask], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ({"rewards": torch.zeros(2, 3) + 0j}, TypeError, ("rewards", "integer", "complex64")),
        ({"rewards": torch.zeros(2, 3, 1)}, ValueError, ("rewards", "[B, T]", "[2, 3, 1]")),
        ({"values": torch.zeros(2, 2)}, ValueError, ("values", "[2, 3]", "[2, 2]")),
        ({"completion_mask": torch.ones(2)}, ValueError, ("completion_mask", "[2, 3]", "[2]")),
        ({"values": torch.zeros(2, 3, device="meta")}, ValueError, ("values", "cpu", "meta")),
        ({"gamma": 1.5}, ValueError, ("gamma", "between 0 and 1", "1.5")),
        ({"lam": NAN}, ValueError, ("lam", "between 0 and 1", "nan")),
        ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, ("cu_seqlens", "[2, 3]")),
    ],
    ids=str,
)
def test_bad_input_is_named(arguments: dict[str, Any], error: type[Exception], parts: tuple[str, ...]) -> None:
    given = {"rewards": torch.zeros(2, 3), "values": torch.zeros(2, 3), "completion_mask": torch.ones(2, 3)}
    given |= arguments
    with pytest.raises(error) as caught:
        gae(given.pop("rewards"), given.pop("values"), given.pop("completion_mask"), **given)
    assert all(part in str(caught.value) for part in parts), caught.value
