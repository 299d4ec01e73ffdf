"""From hidden states to loss, dX and dW, against the three bare GEMMs with fresh outputs: 6 N H V operations."""

from __future__ import annotations

import math
from functools import partial

import torch
from interleaved import Comparison, compare
from providers import PROVIDERS, Loss, checked
from pytest_benchmark.fixture import BenchmarkFixture

from grpo_kernels import distillation_loss, linear_grpo_loss, linear_token_logprobs

HIDDEN, VOCAB = 896, 151936  # Qwen2.5-0.5B
GEMMS, FOUR = "three bare GEMMs", "four bare GEMMs"
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

    def theirs(loss_of: Loss) -> torch.Tensor:
        x, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        loss = loss_of(x, w, ids, advantages, mask, old)
        loss.backward()
        return loss

    rivals, not_timed = {}, []
    for provider in PROVIDERS:
        loss_of, why = checked(provider)
        if loss_of is None:
            not_timed.append(f"not timed: {why}")
        else:
            rivals[provider.name] = loss_of
    torch.testing.assert_close(ours(advantages), theirs(rivals["naive PyTorch"]), rtol=1e-4, atol=1e-5)
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
            **{name: partial(theirs, loss_of) for name, loss_of in rivals.items()},
            QUARTER: lambda: ours(quarter),
            EIGHTH: lambda: ours(advantages, workspace_bytes=logits_bytes // 8),
            FROZEN: lambda: ours(advantages, head_grad=False),
            DENSE: lambda: ours(advantages),
        },
        {},
        rounds=2 if quick else 5,
    )
    comparison.notes += not_timed
    report.append(comparison)


def test_distillation(benchmark: BenchmarkFixture, report: list[Comparison], quick: bool) -> None:
    torch.manual_seed(0)
    rows = 64 if quick else 256
    hidden, teacher = (torch.randn(1, rows, HIDDEN) * 0.3 for _ in range(2))
    weight, teacher_weight = (torch.randn(VOCAB, HIDDEN) * 0.05 for _ in range(2))
    ids, mask = torch.randint(0, VOCAB, (1, rows)), torch.ones(1, rows)
    x, y = hidden.view(-1, HIDDEN), teacher.view(-1, HIDDEN)

    def gemms() -> None:
        logits = x @ weight.t()
        _ = y @ teacher_weight.t(), logits @ weight, logits.t() @ x

    def ours(divergence: str) -> torch.Tensor:
        leaf = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        loss, _ = distillation_loss(
            *leaf,
            ids,
            mask,
            teacher_hidden_states=teacher,
            teacher_lm_head_weight=teacher_weight,
            divergence=divergence,
        )
        loss.backward()
        return loss

    def naive(divergence: str) -> torch.Tensor:
        leaf = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        log_p = (leaf[0] @ leaf[1].t()).log_softmax(-1)
        log_q = (teacher @ teacher_weight.t()).log_softmax(-1)
        if divergence == "js":
            log_m = torch.logaddexp(log_p, log_q) - math.log(2)
            kl = [torch.nn.functional.kl_div(log_m, x, log_target=True, reduction="sum") for x in (log_p, log_q)]
            loss = (kl[0] + kl[1]) / 2 / rows
        else:
            loss = torch.nn.functional.kl_div(log_p, log_q, log_target=True, reduction="sum") / rows
        loss.backward()
        return loss

    for divergence in ("forward_kl", "js"):
        torch.testing.assert_close(ours(divergence), naive(divergence), rtol=1e-4, atol=1e-5)
    comparison = Comparison(f"a teacher's targets to loss, dX and dW, N={rows} H={HIDDEN} V={VOCAB} float32", FOUR, {})
    compare(
        benchmark,
        comparison,
        {
            FOUR: gemms,
            "naive PyTorch, forward KL": lambda: naive("forward_kl"),
            "naive PyTorch, Jensen-Shannon": lambda: naive("js"),
            "distillation_loss, forward KL": lambda: ours("forward_kl"),
            "distillation_loss, Jensen-Shannon": lambda: ours("js"),
        },
        {},
        rounds=2 if quick else 5,
    )
    report.append(comparison)
