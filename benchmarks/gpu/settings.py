"""Our functions over logits in place, in several settings, over a copy: eager and captured."""

from __future__ import annotations

import time
from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from interleaved import Comparison, Step
from problems import COMPLETIONS, Problem, buffer, logits_problem, refill
from providers import GPU_BACKENDS
from torch import Tensor
from works import COPY

from grpo_kernels import GRPOLossConfig, grpo_loss, token_logprobs

KL = GRPOLossConfig(beta=0.04, epsilon_high=0.28, entropy_coef=0.01)
SEQUENCE = GRPOLossConfig(importance_sampling_level="sequence")
#: Targets of bf16 calls in place, over a copy, by backend. The loss is a read and a write. Log-probs are read once more
#: for their gradient, which no forward can know: one and a half copies. A read alone, at 85% of a copy's bandwidth.
TARGETS = {
    "triton": {"grpo_loss": 1.25, "token_logprobs, both": 1.15 * 1.5, "token_logprobs, forward": 0.5 / 0.85},
    "cuda": {"grpo_loss": 1.10, "token_logprobs, both": 1.15 * 1.5, "token_logprobs, forward": 0.5 / 0.85},
}
CAPTURED_SECONDS = 40e-6  # target of a captured call over few tokens


def captured(step: Step) -> Step:
    """``step`` as the replay of a CUDA graph, which the first call captures."""
    replays: list[Step] = []

    def run() -> None:
        if not replays:
            replays.append(_capture(step))
        replays[0]()

    return run


def _capture(step: Step) -> Step:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def calls(problem: Problem, work: Tensor, backend: str, has_settings: bool = False) -> dict[str, Step]:
    """Our functions over the logits in ``work``, in place, by name; ``has_settings``: in other settings too."""

    def loss(advantages: Tensor | None = problem.advantages, **options: Any) -> None:
        leaf = work.detach().requires_grad_()
        options = {"old_logprobs": problem.old, "backend": backend} | options
        grpo_loss(leaf, problem.ids, advantages, problem.mask, inplace=True, **options).loss.backward()

    def forward() -> None:
        with torch.no_grad():
            token_logprobs(problem.logits, problem.ids, backend=backend)

    def both() -> None:
        leaf = work.detach().requires_grad_()
        found = token_logprobs(leaf, problem.ids, inplace_backward=True, backend=backend)
        found.logprobs.backward(problem.upstream)

    steps: dict[str, Step] = {"grpo_loss": loss, "token_logprobs, both": both, "token_logprobs, forward": forward}
    if work.device.type == "cuda":
        steps |= {f"{name}, captured": captured(steps[name]) for name in ("grpo_loss", "token_logprobs, both")}
    if has_settings:
        rewards = torch.rand(COMPLETIONS, device=work.device)
        steps |= {
            "grpo_loss, from rewards": lambda: loss(None, rewards=rewards, num_generations=4),
            "grpo_loss, KL and entropy bonus": lambda: loss(ref_logprobs=problem.old, config=KL),
            "grpo_loss, softcap": lambda: loss(softcap=30.0),
            "grpo_loss, sequence level": lambda: loss(config=SEQUENCE),
        }
    return steps


def in_place(
    dtype: torch.dtype,
    tokens: int,
    vocab: int,
    device: torch.device,
    backends: Collection[str],
    has_settings: bool = False,
) -> Comparison:
    """``calls`` of every backend. Floor: one copy of the logits, 2 N V s bytes."""
    problem = logits_problem(tokens, vocab, dtype, device)
    work = buffer(problem)
    kind, more = ("settings", ", in other settings too") if has_settings else ("calls", "")
    title = f"grpo_loss and token_logprobs in place{more}, N={tokens} V={vocab} {str(dtype)[6:]}"
    comparison = Comparison(kind, title, COPY, {"N": tokens, "V": vocab}, str(dtype)[6:], bytes=2.0 * work.nbytes)
    comparison.contenders[COPY] = partial(refill, work, problem)
    for backend in backends:
        label = GPU_BACKENDS[backend]
        steps = calls(problem, work, backend, has_settings)
        comparison.contenders |= {f"{name}, {label}": step for name, step in steps.items()}
        if dtype == torch.bfloat16:
            comparison.targets |= {f"{name}, {label}": share for name, share in TARGETS[backend].items()}
    comparison.prepare = dict.fromkeys(comparison.contenders, partial(refill, work, problem))
    return comparison


def target_captured(comparison: Comparison, device: torch.device) -> None:
    """Sets the target of captured calls, and notes what the host needs for each call, one after the other."""
    names = [name for name in comparison.times if name != comparison.floor]
    share = CAPTURED_SECONDS / comparison.median(comparison.floor)
    comparison.targets = {name: share for name in names if "captured" in name}
    found = [f"{name} {_host_seconds(comparison.contenders[name], device) * 1e6:.0f} µs" for name in names]
    comparison.notes.append(
        f"captured: target {CAPTURED_SECONDS * 1e6:.0f} µs; by the host's clock: {', '.join(found)}"
    )


def _host_seconds(step: Step, device: torch.device) -> float:
    """Of one call of many, with whatever the host does for it."""
    count, wait = (100, torch.cuda.synchronize) if device.type == "cuda" else (1, lambda: None)
    wait()
    start = time.perf_counter()
    for _ in range(count):
        step()
    wait()
    return (time.perf_counter() - start) / count
