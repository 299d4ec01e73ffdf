"""From logits, from hidden states, log-probs alone, under any gradient, from rewards and log-probs: all providers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from interleaved import Comparison, compare
from problems import HEADS
from providers import OURS
from pytest_benchmark.fixture import BenchmarkFixture
from qualify import Sizes, Verdicts
from works import FEW, from_hidden, from_logits, logprobs_alone, policy, under_upstream

CPU = torch.device("cpu")
QWEN = HEADS["Qwen2.5-0.5B"]
Report = Callable[[Comparison], None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_from_logits(
    benchmark: BenchmarkFixture, report: Report, quick: bool, sizes: Sizes, verdicts: Verdicts, dtype: torch.dtype
) -> None:
    comparison = from_logits(sizes.tokens, sizes.head[1], dtype, CPU, verdicts)
    if dtype == torch.float32 and not quick:
        comparison.targets[OURS] = 1.8
    compare(benchmark, comparison, rounds=3 if quick else 7)
    if OURS in comparison.times:
        speedup = comparison.median("naive PyTorch") / comparison.median(OURS)
        wanted = 6 if dtype == torch.float32 else 8
        comparison.notes.append(f"naive PyTorch over {OURS}: {speedup:.1f}x (asked: {wanted}x)")
    report(comparison)


@pytest.mark.parametrize("tokens", [512, 256, 128])
def test_from_hidden(
    benchmark: BenchmarkFixture, report: Report, quick: bool, sizes: Sizes, verdicts: Verdicts, tokens: int
) -> None:
    if quick and tokens != 512:
        pytest.skip("one size is quick")
    only = () if tokens == 512 else (*FEW, "Liger", f"{OURS}, 1/8 workspace")
    given = (min(tokens, sizes.tokens), sizes.head, torch.float32, CPU, verdicts)
    comparison = from_hidden(*given, only=only, sizes=sizes)
    if tokens == 512 and not quick:
        comparison.targets = {OURS: 1.05, f"{OURS}, 1/8 workspace": 1.5}
    compare(benchmark, comparison, rounds=3 if tokens == 512 else 2)
    report(comparison)


@pytest.mark.parametrize(("live", "frozen"), [(0.5, False), (0.25, False), (1.0, True)])
def test_fewer_gradients(
    benchmark: BenchmarkFixture, report: Report, quick: bool, sizes: Sizes, verdicts: Verdicts, live: float,
    frozen: bool,
) -> None:  # fmt: skip
    given = (sizes.tokens, sizes.head, torch.float32, CPU, verdicts)
    comparison = from_hidden(*given, live=live, frozen=frozen, only=("naive PyTorch", "TRL", OURS))
    if live == 0.25 and not quick:
        comparison.targets = {OURS: 0.66}
    compare(benchmark, comparison, rounds=2)
    report(comparison)


@pytest.mark.parametrize("model", [name for name in HEADS if HEADS[name] != QWEN])
def test_larger_heads(benchmark: BenchmarkFixture, report: Report, quick: bool, verdicts: Verdicts, model: str) -> None:
    if quick:
        pytest.skip("gigabytes of a head are not quick")
    comparison = from_hidden(64, HEADS[model], torch.float32, CPU, verdicts, only=("naive PyTorch", "TRL", OURS))
    compare(benchmark, comparison, rounds=2)
    report(comparison)


@pytest.mark.parametrize("vocab", [32000, 65536])
def test_smaller_vocabularies(
    benchmark: BenchmarkFixture, report: Report, quick: bool, verdicts: Verdicts, vocab: int
) -> None:
    """With the head of ``test_from_hidden`` at as many tokens: how time grows with V."""
    if quick:
        pytest.skip("one vocabulary is quick")
    comparison = from_hidden(256, (QWEN[0], vocab), torch.float32, CPU, verdicts, only=FEW)
    compare(benchmark, comparison, rounds=3)
    report(comparison)


def test_logprobs_alone(benchmark: BenchmarkFixture, report: Report, sizes: Sizes, verdicts: Verdicts) -> None:
    comparison = logprobs_alone(sizes.tokens, sizes.head, torch.float32, CPU, verdicts)
    compare(benchmark, comparison, rounds=3)
    report(comparison)


@pytest.mark.parametrize("live", [1.0, 0.25])
def test_under_upstream(
    benchmark: BenchmarkFixture, report: Report, quick: bool, sizes: Sizes, verdicts: Verdicts, live: float
) -> None:
    only = () if live == 1 else (*FEW, f"{OURS}, projected again")
    comparison = under_upstream(sizes.tokens // 2, sizes.head, torch.float32, CPU, verdicts, live=live, only=only)
    if live == 1 and not quick:
        comparison.targets = {OURS: 1.05}
    compare(benchmark, comparison, rounds=3 if live < 1 else 2)
    report(comparison)


def test_policy(benchmark: BenchmarkFixture, report: Report, quick: bool) -> None:
    comparison = policy(*((16, 64) if quick else (64, 4096)), CPU)
    compare(benchmark, comparison, rounds=15)
    report(comparison)
