"""From logits to loss and gradient, against one warm copy of the logits: the floor is 2 N V s bytes."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from interleaved import Comparison, compare
from naive import naive_grpo_loss
from pytest_benchmark.fixture import BenchmarkFixture

from grpo_kernels import grpo_loss, token_logprobs

VOCAB = 151936  # Qwen2.5
COPY = "copy into existing memory"
NAIVE = "naive PyTorch"
OURS = "grpo_loss, in place"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grpo_loss(benchmark: BenchmarkFixture, report: list[Comparison], quick: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    length = 4 if quick else 64
    logits = (torch.randn(8, length, VOCAB) * 2).to(dtype)
    ids = torch.randint(0, VOCAB, (8, length))
    mask, advantages = torch.ones(8, length), torch.randn(8)
    with torch.no_grad():
        old = token_logprobs(logits, ids).logprobs + 0.1 * torch.randn(8, length)
    target = torch.empty_like(logits)
    work = torch.empty_like(logits)

    def naive() -> torch.Tensor:
        leaf = logits.detach().requires_grad_()
        loss = naive_grpo_loss(leaf, ids, advantages, mask, old)
        loss.backward()
        return loss

    def ours() -> torch.Tensor:
        leaf = work.detach().requires_grad_()
        loss = grpo_loss(leaf, ids, advantages, mask, old_logprobs=old, inplace=True).loss
        loss.backward()
        return loss

    def fresh() -> torch.Tensor:
        leaf = logits.detach().requires_grad_()
        loss = grpo_loss(leaf, ids, advantages, mask, old_logprobs=old).loss
        loss.backward()
        return loss

    torch.testing.assert_close(fresh(), naive(), rtol=1e-4, atol=1e-5)
    comparison = Comparison(f"logits to loss and dlogits, [8, {length}, {VOCAB}] {dtype}", COPY)
    if dtype == torch.float32 and not quick:
        comparison.targets[OURS] = 1.8
    compare(
        benchmark,
        comparison,
        {COPY: lambda: target.copy_(logits), NAIVE: naive, "grpo_loss, fresh gradient": fresh, OURS: ours},
        {OURS: lambda: work.copy_(logits)},
        rounds=3 if quick else 9,
    )
    speedup = comparison.median(NAIVE) / comparison.median(OURS)
    wanted = 6 if dtype == torch.float32 else 8
    comparison.notes.append(f"naive PyTorch over ours: {speedup:.1f}x (target {wanted}x)")
    comparison.notes.append(f"extra memory in place: {extra_memory(length, dtype):.2%} of the logits (target 2%)")
    report.append(comparison)


def extra_memory(length: int, dtype: torch.dtype) -> float:
    """Peak resident memory that the in-place loss adds, over the bytes of the logits, in a process of its own."""
    script = f"""
        import resource, torch
        from grpo_kernels import grpo_loss
        def step(length):
            logits = torch.empty(8, length, {VOCAB}, dtype={dtype}).normal_().requires_grad_()
            ids = torch.zeros(8, length, dtype=torch.long)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            grpo_loss(logits, ids, torch.randn(8), torch.ones(8, length), inplace=True).loss.backward()
            return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / logits.nbytes
        step(1)  # code pages and thread stacks are there before
        print(step({length}))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    return float(done.stdout)
