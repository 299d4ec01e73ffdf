"""From hidden states to loss, dX and dW, against the three bare GEMMs with fresh outputs: 6 N H V operations."""

from __future__ import annotations

import torch
from interleaved import Comparison, compare
from naive import naive_grpo_loss
from pytest_benchmark.fixture import BenchmarkFixture

from grpo_kernels import linear_grpo_loss, linear_token_logprobs

HIDDEN, VOCAB = 896, 151936  # Qwen2.5-0.5B
GEMMS = "three bare GEMMs"
DENSE = "linear_grpo_loss"
QUARTER = "linear_grpo_loss, 1/4 of rows live"
EIGHTH = "linear_grpo_loss, 1/8 workspace"
FROZEN = "linear_grpo_loss, frozen head"


def test_linear_grpo_loss(benchmark: BenchmarkFixture, report: list[Comparison], quick: bool) -> None:
    torch.manual_seed(0)
    batch, length = (8, 8) if quick else (8, 64)
    hidden = torch.randn(batch, length, HIDDEN) * 0.3
    weight = torch.randn(VOCAB, HIDDEN) * 0.05
    ids = torch.randint(0, VOCAB, (batch, length))
    mask, advantages = torch.ones(batch, length), torch.randn(batch)
    quarter = advantages * (torch.arange(batch) < batch // 4)
    with torch.no_grad():
        old = linear_token_logprobs(hidden, weight, ids).logprobs
    logits_bytes = batch * length * VOCAB * 4
    rows = hidden.view(-1, HIDDEN)

    def gemms() -> None:
        logits = rows @ weight.t()
        _ = logits @ weight, logits.t() @ rows

    def ours(advantages: torch.Tensor, head_grad: bool = True, workspace_bytes: int = logits_bytes) -> torch.Tensor:
        x, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_(head_grad)
        loss = linear_grpo_loss(x, w, ids, advantages, mask, old_logprobs=old, workspace_bytes=workspace_bytes).loss
        loss.backward()
        return loss

    def naive() -> torch.Tensor:
        x, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        loss = naive_grpo_loss(x @ w.t(), ids, advantages, mask, old)
        loss.backward()
        return loss

    torch.testing.assert_close(ours(advantages), naive(), rtol=1e-4, atol=1e-5)
    comparison = Comparison(
        f"hidden states to loss, dX and dW, N={batch * length} H={HIDDEN} V={VOCAB} float32",
        GEMMS,
        {} if quick else {DENSE: 1.15, QUARTER: 0.7, EIGHTH: 1.6},
    )
    compare(
        benchmark,
        comparison,
        {
            GEMMS: gemms,
            "naive PyTorch": naive,
            QUARTER: lambda: ours(quarter),
            EIGHTH: lambda: ours(advantages, workspace_bytes=logits_bytes // 8),
            FROZEN: lambda: ours(advantages, head_grad=False),
            DENSE: lambda: ours(advantages),
        },
        {},
        rounds=2 if quick else 5,
    )
    report.append(comparison)
