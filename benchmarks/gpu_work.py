"""What is timed on a GPU: the works of ``works.py`` at its sizes, and ours in more settings over a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from interleaved import Comparison, Step, time_in_turns
from problems import COMPLETIONS, HEADS, buffer, logits_problem, refill
from providers import OURS
from qualify import Case, Verdicts
from qualify import Sizes as ProblemSizes
from torch import Tensor
from works import COPY, FEW, Head, from_hidden, from_logits, logprobs_alone, policy, under_upstream

from grpo_kernels import GRPOLossConfig, grpo_loss, linear_token_logprobs, token_logprobs

KL = GRPOLossConfig(beta=0.04, epsilon_high=0.28, entropy_coef=0.01)
SEQUENCE = GRPOLossConfig(importance_sampling_level="sequence")
HALF, SINGLE = torch.bfloat16, torch.float32
CASES: tuple[Case, ...] = (("logits", "bfloat16"), ("logits", "float32"), ("hidden", "bfloat16"),
                           ("logprobs", "bfloat16"), ("upstream", "bfloat16"))  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Heads ``(N, (H, V))``, the first with fewer live rows too and with other N; logits ``(dtype, N, V)``."""

    heads: tuple[tuple[int, Head], ...] = (
        (8192, HEADS["Llama-3.1-8B"]),
        (8192, HEADS["Qwen2.5-0.5B"]),
        (8192, HEADS["Qwen3-32B"]),
        (8192, HEADS["DeepSeek-V3"]),
    )
    logits: tuple[tuple[torch.dtype, int, int], ...] = (
        (HALF, 8192, 151936),
        (SINGLE, 4096, 151936),
        (HALF, 32768, 32000),
        (SINGLE, 16384, 32000),
    )
    tokens: tuple[int, ...] = (1024, 32768, 131072)  # at the first head
    vocabularies: tuple[int, ...] = (32000, 65536)  # with its hidden size and number of tokens
    policy: tuple[int, int] = (256, 8192)
    exact_tokens: int = 256  # where the whole is formed in fp64
    checked: ProblemSizes = field(default_factory=ProblemSizes)

    @classmethod
    def smoke(cls) -> Sizes:
        checked = ProblemSizes((8, 32, 97), 8, (), (32, 96))
        return cls(((8, (32, 96)),), ((HALF, 8, 96),), (), (), (8, 8), 8, checked)


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


def settings(dtype: torch.dtype, tokens: int, vocab: int, device: torch.device) -> Comparison:
    """``grpo_loss`` and ``token_logprobs`` in other settings, in place, over one copy of the logits: 2 N V s bytes."""
    problem = logits_problem(tokens, vocab, dtype, device)
    work = buffer(problem)
    rewards = torch.rand(COMPLETIONS, device=device)

    def ours(advantages: Tensor | None = problem.advantages, **options: Any) -> None:
        leaf = work.detach().requires_grad_()
        options = {"old_logprobs": problem.old, "backend": "triton"} | options
        grpo_loss(leaf, problem.ids, advantages, problem.mask, inplace=True, **options).loss.backward()

    def forward() -> None:
        with torch.no_grad():
            token_logprobs(problem.logits, problem.ids, backend="triton")

    def both() -> None:
        leaf = work.detach().requires_grad_()
        found = token_logprobs(leaf, problem.ids, inplace_backward=True, backend="triton")
        found.logprobs.backward(problem.upstream)

    title = f"logits to loss and dlogits in other settings, N={tokens} V={vocab} {str(dtype)[6:]}"
    comparison = Comparison("settings", title, COPY, {"N": tokens, "V": vocab}, str(dtype)[6:])
    comparison.bytes = 2.0 * work.nbytes
    comparison.contenders = {
        COPY: lambda: work.copy_(problem.logits),
        "grpo_loss": ours,
        **({"grpo_loss, captured": captured(ours)} if device.type == "cuda" else {}),
        "grpo_loss, from rewards": lambda: ours(None, rewards=rewards, num_generations=4),
        "grpo_loss, KL and entropy bonus": lambda: ours(ref_logprobs=problem.old, config=KL),
        "grpo_loss, softcap": lambda: ours(softcap=30.0),
        "grpo_loss, sequence level": lambda: ours(config=SEQUENCE),
        "token_logprobs, forward": forward,
        "token_logprobs, both": both,
    }
    comparison.prepare = dict.fromkeys(comparison.contenders, partial(refill, work, problem))
    if dtype == HALF:  # one read at 85% of a copy's bandwidth
        comparison.targets = {"grpo_loss": 1.15, "token_logprobs, forward": 0.5 / 0.85}
    return comparison


def _noted(comparison: Comparison, rounds: int, device: torch.device, deadline: float) -> Comparison:
    """Timed, with what it is over TRL."""
    time_in_turns(comparison, rounds, device, deadline)
    ours = OURS if comparison.work != "hidden" else f"{OURS}, bf16 logits"
    if {"TRL", ours} <= comparison.times.keys():
        asked = {("hidden", 1.0): " (asked: 1.3x)", ("hidden", 0.25): " (asked: 2.4x)"}
        ratio = comparison.median("TRL") / comparison.median(ours)
        told = asked.get((comparison.work, comparison.live), "")
        comparison.notes.append(f"TRL over {ours}: {ratio:.2f}x{told}")
    return comparison


def comparisons(
    sizes: Sizes, device: torch.device, verdicts: Verdicts, rounds: int, deadline: float
) -> Iterator[tuple[str, Callable[[], Comparison]]]:
    """Every comparison by name, as a function that makes and times it; those first that say most."""
    common = {"device": device, "verdicts": verdicts, "backend": "triton"}

    def timed(make: Callable[..., Comparison], *arguments: Any, targets: dict[str, float] | None = None,
              **options: Any) -> Callable[[], Comparison]:  # fmt: skip
        def measure() -> Comparison:
            comparison = make(*arguments, **options)
            comparison.targets |= targets or {}
            return _noted(comparison, rounds, device, deadline)

        return measure

    bf16 = f"{OURS}, bf16 logits"
    (tokens, head), *others = sizes.heads
    first = (tokens, head, HALF)
    few = (*FEW, "Liger", bf16)
    yield "hidden", timed(from_hidden, *first, targets={OURS: 1.15, bf16: 1.10}, **common)
    yield "hidden, 25% live", timed(from_hidden, *first, live=0.25, only=few, targets={OURS: 0.6, bf16: 0.6}, **common)
    dtype, rows, vocab = sizes.logits[0]
    yield "logits", timed(from_logits, rows, vocab, dtype, targets={OURS: 1.15}, **common)
    yield "settings", timed(settings, dtype, rows, vocab, device)
    yield "frozen", timed(from_hidden, *first, frozen=True, only=few, targets={OURS: 1.125}, **common)
    yield "log-probs", timed(logprobs_alone, *first, **common)
    yield "upstream", timed(under_upstream, *first, **common)
    yield "hidden, 50% live", timed(from_hidden, *first, live=0.5, only=few, **common)
    for tokens, head in others:
        yield f"hidden, H={head[0]}", timed(from_hidden, tokens, head, HALF, only=few, **common)
    yield "policy", timed(policy, *sizes.policy, device, "triton")
    for dtype, rows, vocab in sizes.logits[1:]:
        yield f"logits, {dtype} V={vocab}", timed(from_logits, rows, vocab, dtype, **common)
        yield f"settings, {dtype} V={vocab}", timed(settings, dtype, rows, vocab, device)
    (tokens, head), *_ = sizes.heads
    for vocab in sizes.vocabularies:
        yield f"hidden, V={vocab}", timed(from_hidden, tokens, (head[0], vocab), HALF, only=FEW, **common)
    for tokens in sizes.tokens:
        yield f"hidden, N={tokens}", timed(from_hidden, tokens, head, HALF, only=FEW, **common)


def accuracy(sizes: Sizes, device: torch.device) -> list[dict[str, Any]]:
    """Errors against fp64 on the same bf16 hidden states and weight, beside those of whole fp32 logits."""
    hidden_size, vocab = sizes.heads[0][1]
    hidden = torch.empty(1, sizes.exact_tokens, hidden_size, dtype=HALF, device=device).normal_()
    weight = torch.empty(vocab, hidden_size, dtype=HALF, device=device).normal_(0, 2 / hidden_size**0.5)
    ids = torch.randint(vocab, hidden.shape[:2], device=device)

    def plain(dtype: torch.dtype, x: Tensor, w: Tensor) -> Tensor:
        return torch.log_softmax(x.to(dtype) @ w.to(dtype).t(), -1).gather(-1, ids[..., None])[..., 0]

    found = []
    for dtype, function in (
        (torch.float64, partial(plain, torch.float64)),
        (HALF, partial(plain, SINGLE)),
        (HALF, lambda x, w: linear_token_logprobs(x, w, ids, backend="triton").logprobs),
    ):
        x, w = (values.detach().to(dtype).requires_grad_() for values in (hidden, weight))
        logprobs = function(x, w)
        found.append([y.double() for y in (logprobs.detach(), *torch.autograd.grad(logprobs.sum(), (x, w)))])
    errors = [
        ((got[0] - found[0][0]).abs().max().item(), *((y - y64).norm().item() / y64.norm().item()
                                                      for y, y64 in zip(got[1:], found[0][1:], strict=True)))
        for got in found[1:]
    ]  # fmt: skip
    return [
        {"what": what, "error": error, "reference": reference, "ratio": error / reference, "asked": 2}
        for what, reference, error in zip(("log-probs, largest", "dX, relative L2", "dW, relative L2"), *errors,
                                          strict=True)
    ]  # fmt: skip
