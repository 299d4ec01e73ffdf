"""From logits to loss and gradient, against one warm copy of the logits: the floor is 2 N V s bytes."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from functools import partial

import pytest
import torch
from interleaved import Comparison, compare
from naive import naive_grpo_loss
from pytest_benchmark.fixture import BenchmarkFixture

from grpo_kernels import GRPOLossConfig, grpo_loss, token_logprobs

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


VARIANTS = {
    "dapo": {},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo"},
    "reinforce": {"loss_type": "reinforce"},
    "surrogate": {"loss_type": "surrogate"},
    "k1, straight-through": {"beta": 0.1, "kl_estimator": "k1", "kl_gradient": "straight_through",
                             "use_bias_correction_kl": False},
    "k3, clamped": {"beta": 0.1, "kl_clamp": 10.0, "log_ratio_clamp": 20.0},
    "gmpo: a second pass": {"loss_type": "gmpo"},
    "vespo: a second pass": {"loss_type": "vespo"},
    "off-policy mask: a second pass": {"off_policy_mask_threshold": 1.0},
}  # fmt: skip


def test_variants(benchmark: BenchmarkFixture, report: list[Comparison], quick: bool) -> None:
    """No variant of the loss costs what a logit costs, but those that wait for log-probabilities."""
    torch.manual_seed(0)
    length = 4 if quick else 32
    logits = torch.randn(8, length, VOCAB) * 2
    work = torch.empty_like(logits)
    ids, mask, advantages = torch.randint(0, VOCAB, (8, length)), torch.ones(8, length), torch.randn(8)
    with torch.no_grad():  # ratios of 1: no row is clipped, so all have the same work
        old = token_logprobs(logits, ids).logprobs

    def step(config: GRPOLossConfig) -> None:
        leaf = work.detach().requires_grad_()
        ref = old if config.beta else None
        grpo_loss(
            leaf, ids, advantages, mask, old_logprobs=old, ref_logprobs=ref, config=config, inplace=True
        ).loss.backward()

    contenders = {name: partial(step, GRPOLossConfig(**options)) for name, options in VARIANTS.items()}
    comparison = Comparison(f"variants of grpo_loss in place over dapo, [8, {length}, {VOCAB}] torch.float32", "dapo")
    if not quick:
        comparison.targets = {name: 1.03 for name in VARIANTS if "pass" not in name}
    prepare = dict.fromkeys(contenders, lambda: work.copy_(logits))
    compare(benchmark, comparison, contenders, prepare, rounds=2 if quick else 15)
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
