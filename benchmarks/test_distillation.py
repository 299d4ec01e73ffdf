"""A teacher's targets, from hidden states and heads of both, against the four bare GEMMs: 8 N H V operations."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from interleaved import Comparison, compare
from providers import OURS
from pytest_benchmark.fixture import BenchmarkFixture
from qualify import Sizes
from torch import Tensor
from works import GEMMS

from grpo_kernels import distillation_loss

KL, JS = f"{OURS}, forward KL", f"{OURS}, Jensen-Shannon"


def test_distillation(benchmark: BenchmarkFixture, report: Callable[[Comparison], None], sizes: Sizes) -> None:
    torch.manual_seed(0)
    rows, (hidden_size, vocab) = sizes.tokens // 2, sizes.head
    hidden, teacher = (torch.randn(1, rows, hidden_size) for _ in range(2))
    weight, teacher_weight = (torch.randn(vocab, hidden_size) * 2 / hidden_size**0.5 for _ in range(2))
    ids, mask = torch.randint(0, vocab, (1, rows)), torch.ones(1, rows)
    x, y = hidden.view(-1, hidden_size), teacher.view(-1, hidden_size)

    def gemms() -> None:
        logits = x @ weight.t()
        _ = y @ teacher_weight.t(), logits @ weight, logits.t() @ x

    def ours(divergence: str) -> Tensor:
        leaf = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        given = {"teacher_hidden_states": teacher, "teacher_lm_head_weight": teacher_weight}
        loss, _ = distillation_loss(*leaf, ids, mask, divergence=divergence, **given)
        loss.backward()
        return loss

    def naive(divergence: str) -> Tensor:
        leaf = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        log_p = (leaf[0] @ leaf[1].t()).log_softmax(-1)
        log_q = (teacher @ teacher_weight.t()).log_softmax(-1)
        kl = torch.nn.functional.kl_div
        if divergence == "js":
            log_m = torch.logaddexp(log_p, log_q) - math.log(2)
            loss = sum(kl(log_m, side, log_target=True, reduction="sum") for side in (log_p, log_q)) / 2 / rows
        else:
            loss = kl(log_p, log_q, log_target=True, reduction="sum") / rows
        loss.backward()
        return loss

    for divergence in ("forward_kl", "js"):
        torch.testing.assert_close(ours(divergence), naive(divergence), rtol=1e-4, atol=1e-5)
    comparison = Comparison(
        "distillation",
        f"a teacher's hidden states and head to loss, dX and dW, N={rows} H={hidden_size} V={vocab} float32",
        GEMMS,
        {"N": rows, "H": hidden_size, "V": vocab},
        operations=8.0 * rows * hidden_size * vocab,
        contenders={
            GEMMS: gemms,
            "naive PyTorch, forward KL": lambda: naive("forward_kl"),
            "naive PyTorch, Jensen-Shannon": lambda: naive("js"),
            JS: lambda: ours("js"),
            KL: lambda: ours("forward_kl"),
        },
    )
    compare(benchmark, comparison, rounds=2)
    report(comparison)
