"""What is timed, on a CPU and on a GPU alike: each work with its floor, all providers that may be timed, and ours."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial

import torch
from interleaved import Comparison
from naive import naive_policy_step
from problems import COMPLETIONS, TASKS, Problem, buffers, head_problem, logits_problem, refill
from providers import OURS, OURS_ON_CPU, providers
from qualify import Sizes, Verdicts
from torch import Tensor

from grpo_kernels import GRPOLossConfig, group_advantages, policy_loss

COPY = "copy into existing memory"
GEMMS = "bare GEMMs"
Head = tuple[int, int]
#: Whom to hold against ours where all of them would take too long.
FEW = ("naive PyTorch", "torch linear_cross_entropy", "TRL", OURS)


def from_logits(
    tokens: int,
    vocab: int,
    dtype: torch.dtype,
    device: torch.device,
    verdicts: Verdicts,
    ours: Mapping[str, str] = OURS_ON_CPU,
    only: Collection[str] = (),
) -> Comparison:
    """Logits to loss and gradient. Floor: one warm copy of the logits, 2 N V s bytes."""
    problem = logits_problem(tokens, vocab, dtype, device)
    work = buffers(problem)
    comparison = titled("logits", "logits to loss and dlogits", {"N": tokens, "V": vocab}, dtype, COPY)
    comparison.bytes = 2.0 * problem.logits.nbytes
    comparison.contenders[COPY] = comparison.prepare[COPY] = partial(refill, work[False], problem)
    _enter(comparison, "logits", problem, verdicts, ours, only, peaks_at=tokens, work=work)
    return comparison


def from_hidden(
    tokens: int,
    head: Head,
    dtype: torch.dtype,
    device: torch.device,
    verdicts: Verdicts,
    ours: Mapping[str, str] = OURS_ON_CPU,
    live: float = 1.0,
    frozen: bool = False,
    only: Collection[str] = (),
    sizes: Sizes | None = None,
) -> Comparison:
    """Hidden states and head to loss, dX and dW. Floor: the GEMMs alone, 6 N H V operations; 4 with a frozen head."""
    problem = replace(head_problem(tokens, *head, dtype, device).with_live(live), frozen=frozen)
    what = "loss and dX, the head frozen" if frozen else "loss, dX and dW"
    share = "" if live == 1 else f", {live:.0%} of the rows live"
    name, shape = "frozen" if frozen else "hidden", shape_of(tokens, head)
    comparison = titled(name, f"hidden states to {what}{share}", shape, dtype, GEMMS, live)
    comparison.operations = (4.0 if frozen else 6.0) * tokens * head[0] * head[1]
    comparison.contenders[GEMMS] = bare_gemms(problem, "dX" if frozen else "dX, dW")
    whole = sizes is not None and head == sizes.head and live == 1 and not frozen
    _enter(comparison, "hidden", problem, verdicts, ours, only, peaks_at=tokens if whole else None)
    return comparison


def logprobs_alone(
    tokens: int,
    head: Head,
    dtype: torch.dtype,
    device: torch.device,
    verdicts: Verdicts,
    ours: Mapping[str, str] = OURS_ON_CPU,
) -> Comparison:
    """Log-probs without a gradient, as for old and reference policies. Floor: one GEMM, 2 N H V operations."""
    problem = head_problem(tokens, *head, dtype, device)
    comparison = titled("logprobs", "hidden states to log-probs", shape_of(tokens, head), dtype, GEMMS)
    comparison.operations = 2.0 * tokens * head[0] * head[1]
    comparison.contenders[GEMMS] = bare_gemms(problem, "")
    _enter(comparison, "logprobs", problem, verdicts, ours, peaks_at=tokens)
    return comparison


def under_upstream(
    tokens: int,
    head: Head,
    dtype: torch.dtype,
    device: torch.device,
    verdicts: Verdicts,
    ours: Mapping[str, str] = OURS_ON_CPU,
    live: float = 1.0,
    only: Collection[str] = (),
) -> Comparison:
    """Log-probs, then dX and dW under a gradient nobody could know. Floor: three GEMMs, 6 N H V operations."""
    problem = head_problem(tokens, *head, dtype, device).with_live(live)
    share = "" if live == 1 else f", {live:.0%} of the rows with one"
    title = f"hidden states to log-probs, dX and dW under any gradient{share}"
    comparison = titled("upstream", title, shape_of(tokens, head), dtype, GEMMS, live)
    comparison.operations = 6.0 * tokens * head[0] * head[1]
    comparison.contenders[GEMMS] = bare_gemms(problem, "dX, dW")
    _enter(comparison, "upstream", problem, verdicts, ours, only, peaks_at=tokens if live == 1 else None)
    return comparison


def policy(completions: int, length: int, device: torch.device, ours: Mapping[str, str] = OURS_ON_CPU) -> Comparison:
    """Rewards and log-probs [B, T] to loss, gradient and TRL's metrics. Floor: a copy of as many bytes.

    Read: log-probs, old and reference log-probs, mask; written: the gradient.
    """
    config = GRPOLossConfig(beta=0.04, use_bias_correction_kl=False)
    torch.manual_seed(0)
    logprobs = torch.randn(completions, length, device=device) - 3
    old, ref = (logprobs + 0.2 * torch.randn_like(logprobs) for _ in range(2))
    mask = (torch.rand_like(logprobs) < 0.9).float()
    rewards = torch.rand(completions, device=device)

    def fused(backend: str) -> tuple[Tensor, Tensor]:
        leaf = logprobs.detach().requires_grad_()
        advantages = group_advantages(rewards, COMPLETIONS, backend=backend)
        given = {"old_logprobs": old, "ref_logprobs": ref, "config": config, "backend": backend}
        loss = policy_loss(leaf, advantages, mask, **given).loss
        loss.backward()
        return loss.detach(), leaf.grad

    def naive(step: Callable[..., tuple[Tensor, dict[str, Tensor]]]) -> tuple[Tensor, Tensor]:
        leaf = logprobs.detach().requires_grad_()
        loss, _ = step(leaf, old, ref, mask, rewards, COMPLETIONS)
        loss.backward()
        return loss.detach(), leaf.grad

    named = {name: partial(fused, backend) for name, backend in ours.items()}
    values = torch.empty(5, completions, length, device=device)  # 20 B T bytes are moved: half are read, half written
    source, target = values.flatten()[: values.numel() // 2], torch.empty_like(values.flatten()[: values.numel() // 2])
    shape = {"B": completions, "T": length}
    comparison = titled("policy", "rewards and log-probs to loss and gradient", shape, torch.float32, COPY)
    comparison.bytes = 20.0 * completions * length
    comparison.contenders = {
        COPY: lambda: target.copy_(source),
        "naive PyTorch": partial(naive, naive_policy_step),
        "torch.compile of naive": partial(naive, torch.compile(naive_policy_step, dynamic=False)),
        **named,
    }
    expected = naive(naive_policy_step)
    for name, step in named.items():
        found = step()
        comparison.errors[name] = {"gradient": ((found[1] - expected[1]).norm() / expected[1].norm()).item()}
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    return comparison


def titled(work: str, title: str, shape: dict[str, int], dtype: torch.dtype, floor: str,
            live: float = 1.0) -> Comparison:  # fmt: skip
    letters = " ".join(f"{letter}={size}" for letter, size in shape.items())
    name = str(dtype).removeprefix("torch.")
    return Comparison(work, f"{title}, {letters} {name}", floor, shape, name, live)


def shape_of(tokens: int, head: Head) -> dict[str, int]:
    return {"N": tokens, "H": head[0], "V": head[1]}


def bare_gemms(problem: Problem, gradients: str) -> Callable[[], object]:
    """The products that no provider can go without, by the library's own GEMM, into fresh memory."""
    x, w = problem.hidden.flatten(0, 1), problem.weight

    def run() -> object:
        logits = x @ w.t()
        dx = logits @ w if "dX" in gradients else None
        return dx, logits.t() @ x if "dW" in gradients else None

    return run


def _enter(
    comparison: Comparison,
    task: str,
    problem: Problem,
    verdicts: Verdicts,
    ours: Mapping[str, str],
    only: Collection[str] = (),
    peaks_at: int | None = None,
    work: dict[bool, Tensor] | None = None,
) -> None:
    """Adds every provider that serves the task: to the contenders, or with the reason why it is not timed.

    ``work``: of logits, what ``buffers`` gives.
    """
    for provider in providers(ours):
        name = provider.name
        if task not in provider.tasks or (only and name not in only):
            continue
        verdict = verdicts.get((name, (task, comparison.dtype)))
        if verdict is None:  # not among those asked
            continue
        if name.startswith(OURS) and provider.device not in (None, problem.ids.device.type):  # meant for another
            continue
        if verdict.status == "ok":
            comparison.versions[name] = provider.version()
        else:
            comparison.refused[name] = (verdict.status, verdict.reason)
            comparison.errors[name] = verdict.errors
            continue
        comparison.errors[name] = verdict.errors
        if peaks_at in verdict.peaks:
            comparison.peaks[name] = verdict.peaks[peaks_at]
        own = work[provider.padded] if work and provider.in_place else None
        if own is not None:
            comparison.prepare[name] = partial(refill, own, problem)
        comparison.contenders[name] = partial(TASKS[task], provider.tasks[task](), problem, own)
