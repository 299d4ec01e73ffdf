"""What is timed on a GPU: the works of ``works.py`` at its sizes, and ours in more settings over a copy."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from interleaved import Comparison, Step, time_in_turns
from problems import COMPLETIONS, HEADS, Problem, buffer, logits_problem, refill
from providers import GPU_BACKENDS, OURS
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
EACH = tuple(f"{OURS}, {label}" for label in GPU_BACKENDS.values())
#: Of calls in place, over a copy. A read and a write are one copy; log-probs are read once more for their gradient,
#: which no forward can know: one and a half. A read alone, at 85% of a copy's bandwidth.
ASKED = {"grpo_loss": 1.15, "token_logprobs, both": 1.15 * 1.5, "token_logprobs, forward": 0.5 / 0.85}
ASKED_SECONDS = 40e-6  # of a whole call over few tokens


@dataclass(frozen=True)
class Sizes:
    """Heads ``(N, (H, V))``, the first with fewer live rows too and with other N; logits ``(dtype, N, V)``.

    Of bf16 logits much is asked: at ``vocabularies`` with ``tokens``, the fewest beside all peers, and ``few_tokens``.
    """

    heads: tuple[tuple[int, Head], ...] = (
        (8192, HEADS["Llama-3.1-8B"]),
        (8192, HEADS["Qwen2.5-0.5B"]),
        (8192, HEADS["Qwen3-32B"]),
        (8192, HEADS["DeepSeek-V3"]),
    )
    head_tokens: tuple[int, ...] = (1024, 32768, 131072)  # at the first head
    head_vocabularies: tuple[int, ...] = (32000, 65536)  # with its hidden size and number of tokens
    vocabularies: tuple[int, ...] = (151936, 129280, 128256)
    tokens: tuple[int, ...] = (8192, 65536)
    few_tokens: int = 64
    logits: tuple[tuple[torch.dtype, int, int], ...] = (
        (SINGLE, 4096, 151936),
        (HALF, 32768, 32000),
        (SINGLE, 16384, 32000),
    )
    policy: tuple[int, int] = (256, 8192)
    exact_tokens: int = 256  # where the whole is formed in fp64
    checked: ProblemSizes = field(default_factory=ProblemSizes)

    @classmethod
    def smoke(cls) -> Sizes:
        return cls(
            heads=((8, (32, 96)),),
            head_tokens=(),
            head_vocabularies=(),
            vocabularies=(96,),
            tokens=(8, 16),
            few_tokens=8,
            logits=(),
            policy=(8, 8),
            exact_tokens=8,
            checked=ProblemSizes((8, 32, 97), 8, (), (32, 96)),
        )


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
        if dtype == HALF:
            comparison.targets |= {f"{name}, {label}": share for name, share in ASKED.items()}
    comparison.prepare = dict.fromkeys(comparison.contenders, partial(refill, work, problem))
    return comparison


def ask_within(comparison: Comparison, seconds: float, device: torch.device) -> None:
    """Asks it of every timed name, with what the host needs for each, call after call."""
    names = [name for name in comparison.times if name != comparison.floor]
    comparison.targets = {name: seconds / comparison.median(comparison.floor) for name in names}
    found = [f"{name} {_host_seconds(comparison.contenders[name], device) * 1e6:.0f} µs" for name in names]
    comparison.notes.append(f"asked: {seconds * 1e6:.0f} µs; by the host's clock, call after call: {', '.join(found)}")


def _host_seconds(step: Step, device: torch.device) -> float:
    """Of one call of many, with whatever the host does for it."""
    count, wait = (100, torch.cuda.synchronize) if device.type == "cuda" else (1, lambda: None)
    wait()
    start = time.perf_counter()
    for _ in range(count):
        step()
    wait()
    return (time.perf_counter() - start) / count


def _noted(comparison: Comparison, rounds: int, device: torch.device, deadline: float) -> Comparison:
    """Timed, with what it is over TRL."""
    time_in_turns(comparison, rounds, device, deadline)
    asked = {("hidden", 1.0): " (asked: 1.3x)", ("hidden", 0.25): " (asked: 2.4x)"}
    for name in (OURS, *EACH):
        ours = name if comparison.work != "hidden" else f"{name}, bf16 logits"
        if {"TRL", ours} <= comparison.times.keys():
            ratio = comparison.median("TRL") / comparison.median(ours)
            told = asked.get((comparison.work, comparison.live), "")
            comparison.notes.append(f"TRL over {ours}: {ratio:.2f}x{told}")
    return comparison


def _of_each(share: float, setting: str = "") -> dict[str, float]:
    """The same asked of every backend of ours, in one setting."""
    return {f"{name}{setting}": share for name in (OURS, *EACH)}


def comparisons(
    sizes: Sizes,
    device: torch.device,
    verdicts: Verdicts,
    backends: Collection[str],
    rounds: int,
    deadline: float,
) -> Iterator[tuple[str, Callable[[], Comparison]]]:
    """Every comparison by name, as a function that makes and times it; those first that say most.

    ``backends``: of ours that run; where that is not a GPU, the first stands in for "auto".
    """
    auto = "auto" if device.type == "cuda" else next(iter(backends))
    common = {"device": device, "verdicts": verdicts, "backend": auto}
    alone = {"device": device, "backends": backends}

    def timed(make: Callable[..., Comparison], *arguments: Any, targets: dict[str, float] | None = None,
              seconds: float | None = None, **options: Any) -> Callable[[], Comparison]:  # fmt: skip
        def measure() -> Comparison:
            comparison = make(*arguments, **options)
            comparison.targets |= targets or {}
            _noted(comparison, rounds, device, deadline)
            if seconds is not None:
                ask_within(comparison, seconds, device)
            return comparison

        return measure

    half = ", bf16 logits"
    (tokens, head), *others = sizes.heads
    first = (tokens, head, HALF)
    few = (*FEW, "Liger", *EACH, *(f"{name}{half}" for name in (OURS, *EACH)))
    dense, sparse = _of_each(1.15) | _of_each(1.10, half), _of_each(0.6) | _of_each(0.6, half)
    yield "hidden", timed(from_hidden, *first, targets=dense, **common)
    yield "hidden, 25% live", timed(from_hidden, *first, live=0.25, only=few, targets=sparse, **common)
    yield from _over_logits(sizes, timed, common, alone)
    yield "frozen", timed(from_hidden, *first, frozen=True, only=few, targets=_of_each(1.125), **common)
    yield "log-probs", timed(logprobs_alone, *first, **common)
    yield "upstream", timed(under_upstream, *first, **common)
    yield "hidden, 50% live", timed(from_hidden, *first, live=0.5, only=few, **common)
    for tokens, head in others:
        yield f"hidden, H={head[0]}", timed(from_hidden, tokens, head, HALF, only=few, **common)
    yield "policy", timed(policy, *sizes.policy, device, auto, backends)
    for dtype, rows, vocab in sizes.logits:
        yield f"logits, {dtype} V={vocab}", timed(from_logits, rows, vocab, dtype, **common)
        yield f"settings, {dtype} V={vocab}", timed(in_place, dtype, rows, vocab, has_settings=True, **alone)
    (tokens, head), *_ = sizes.heads
    for vocab in sizes.head_vocabularies:
        yield f"hidden, V={vocab}", timed(from_hidden, tokens, (head[0], vocab), HALF, only=(*FEW, *EACH), **common)
    for tokens in sizes.head_tokens:
        yield f"hidden, N={tokens}", timed(from_hidden, tokens, head, HALF, only=(*FEW, *EACH), **common)


def _over_logits(
    sizes: Sizes, timed: Callable[..., Callable[[], Comparison]], common: dict[str, Any], alone: dict[str, Any]
) -> Iterator[tuple[str, Callable[[], Comparison]]]:
    """Those over bf16 logits, of which something is asked."""
    rows = _of_each(ASKED["grpo_loss"]) | _of_each(ASKED["token_logprobs, both"], ", token_logprobs")
    # past 2^31 logits a peer whose offsets have 32 bits would end the whole process
    ours = ("naive PyTorch", *rows, f"{OURS}, fresh gradient")
    for vocab in sizes.vocabularies:
        for tokens in sizes.tokens:
            only = ours if tokens > sizes.tokens[0] else ()
            name = f"N={tokens} V={vocab}"
            yield f"logits, {name}", timed(from_logits, tokens, vocab, HALF, only=only, targets=rows, **common)
            has_settings = (tokens, vocab) == (sizes.tokens[0], sizes.vocabularies[0])
            kind = "settings" if has_settings else "calls"
            yield f"{kind}, {name}", timed(in_place, HALF, tokens, vocab, has_settings=has_settings, **alone)
        few = (HALF, sizes.few_tokens, vocab)
        yield f"calls, N={few[1]} V={vocab}", timed(in_place, *few, seconds=ASKED_SECONDS, **alone)


def accuracy(sizes: Sizes, device: torch.device, backend: str) -> list[dict[str, Any]]:
    """A backend's errors against fp64 on the same bf16 hidden states and weight, beside those of whole fp32 logits."""
    torch.manual_seed(0)
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
        (HALF, lambda x, w: linear_token_logprobs(x, w, ids, backend=backend).logprobs),
    ):
        x, w = (values.detach().to(dtype).requires_grad_() for values in (hidden, weight))
        logprobs = function(x, w)
        found.append([y.double() for y in (logprobs.detach(), *torch.autograd.grad(logprobs.sum(), (x, w)))])
    errors = [
        ((got[0] - found[0][0]).abs().max().item(), *((y - y64).norm().item() / y64.norm().item()
                                                      for y, y64 in zip(got[1:], found[0][1:], strict=True)))
        for got in found[1:]
    ]  # fmt: skip
    names = (
        f"{GPU_BACKENDS[backend]}, {what}" for what in ("log-probs, largest", "dX, relative L2", "dW, relative L2")
    )
    return [
        {"what": name, "error": error, "reference": reference, "ratio": error / reference, "asked": 2}
        for name, reference, error in zip(names, *errors, strict=True)
    ]
