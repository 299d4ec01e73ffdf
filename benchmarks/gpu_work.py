"""What is timed on a GPU, and against what: copies of the logits, bare GEMMs, TRL's chunked head."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from interleaved import Comparison
from naive import naive_grpo_loss
from torch import Tensor

from grpo_kernels import GRPOLossConfig, grpo_loss, linear_grpo_loss, linear_token_logprobs, token_logprobs

COPY = "copy into existing memory"
GEMMS = "three bare GEMMs"
KL = GRPOLossConfig(beta=0.04, epsilon_high=0.28, entropy_coef=0.01)
SEQUENCE = GRPOLossConfig(importance_sampling_level="sequence")
Work = Callable[[], object]


HALF, SINGLE = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Sizes:
    """Heads ``(N, H, V)``, those of Llama 3.1-8B and Qwen2.5-0.5B, and logits ``(dtype, N, V)``."""

    heads: tuple[tuple[int, int, int], ...] = ((8192, 4096, 128256), (8192, 896, 151936))
    logits: tuple[tuple[torch.dtype, int, int], ...] = (
        (HALF, 8192, 151936),
        (SINGLE, 4096, 151936),
        (HALF, 32768, 32000),
        (SINGLE, 16384, 32000),
    )
    exact_tokens: int = 256  # where the whole is formed in fp64

    @classmethod
    def smoke(cls) -> Sizes:
        return cls(((8, 32, 96),), ((HALF, 8, 96),), 8)


def time_in_turns(
    comparison: Comparison, contenders: dict[str, Work], prepare: dict[str, Work], rounds: int, device: torch.device
) -> Comparison:
    """Times every contender once a round, in turns, by the device's clock, after two warm rounds.

    The preparation is queued before the clock starts, so that the host is ahead of the device when it does.
    """
    for name, contender in contenders.items():
        for _ in range(2):
            prepare.get(name, lambda: None)()
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            contender()
            if device.type == "cuda":
                comparison.peaks[name] = torch.cuda.max_memory_allocated() - before
    comparison.times = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            prepare.get(name, lambda: None)()
            comparison.times[name].append(_timed(contender, device))
    return comparison


def _timed(contender: Work, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        contender()
        return time.perf_counter() - start
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    contender()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def captured(step: Work, device: torch.device) -> Work | None:
    """``step`` as the replay of a CUDA graph; None on a CPU."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def from_logits(dtype: torch.dtype, tokens: int, vocab: int, device: torch.device, rounds: int) -> Comparison:
    """``grpo_loss`` and ``token_logprobs`` over one copy of the logits: 2 N V s bytes."""
    torch.manual_seed(0)
    shape = (8, tokens // 8)
    logits = torch.empty(*shape, vocab, dtype=dtype, device=device).normal_(0, 2)
    work = torch.empty_like(logits)
    ids = torch.randint(vocab, shape, device=device)
    mask, advantages = torch.ones(shape, device=device), torch.randn(8, device=device)
    rewards = torch.rand(8, device=device)
    with torch.no_grad():
        old = token_logprobs(logits, ids, backend="triton").logprobs + 0.1 * torch.randn(shape, device=device)

    def ours(values: Tensor, advantages: Tensor | None = advantages, inplace: bool = True, **options: Any) -> Tensor:
        leaf = values.detach().requires_grad_()
        options = {"old_logprobs": old, "backend": "triton"} | options
        loss = grpo_loss(leaf, ids, advantages, mask, inplace=inplace, **options).loss
        loss.backward()
        return loss

    def forward() -> None:
        with torch.no_grad():
            token_logprobs(logits, ids, backend="triton")

    def both() -> None:
        leaf = work.detach().requires_grad_()
        token_logprobs(leaf, ids, inplace_backward=True, backend="triton").logprobs.sum().backward()

    def naive() -> Tensor:
        leaf = logits.detach().requires_grad_()
        loss = naive_grpo_loss(leaf, ids, advantages, mask, old)
        loss.backward()
        return loss

    torch.testing.assert_close(ours(logits, inplace=False), naive(), rtol=1e-3, atol=1e-5)
    replay = captured(partial(ours, work), device)
    contenders: dict[str, Work] = {
        COPY: lambda: work.copy_(logits),
        "naive PyTorch": naive,
        "grpo_loss, in place": lambda: ours(work),
        **({} if replay is None else {"grpo_loss, in place, captured": replay}),
        "grpo_loss, fresh gradient": lambda: ours(logits, inplace=False),
        "grpo_loss, from rewards": lambda: ours(work, None, rewards=rewards, num_generations=4),
        "grpo_loss, KL and entropy bonus": lambda: ours(work, ref_logprobs=old, config=KL),
        "grpo_loss, softcap": lambda: ours(work, softcap=30.0),
        "grpo_loss, sequence level": lambda: ours(work, config=SEQUENCE),
        "token_logprobs, forward": forward,
        "token_logprobs, both, in place": both,
    }
    comparison = Comparison(f"logits to loss and dlogits, N={tokens} V={vocab} {str(dtype)[6:]}", COPY)
    if dtype == HALF:  # one read at 85% of a copy's bandwidth
        comparison.targets = {"grpo_loss, in place": 1.5, "token_logprobs, forward": 0.5 / 0.85}
    time_in_turns(comparison, contenders, dict.fromkeys(contenders, lambda: work.copy_(logits)), rounds, device)
    read = 0.5 / comparison.over_floor("token_logprobs, forward")
    comparison.notes.append(f"token_logprobs, forward: {read:.0%} of the copy's bandwidth (asked: 85%)")
    return comparison


def from_hidden(tokens: int, hidden_size: int, vocab: int, device: torch.device, rounds: int) -> Comparison:
    """``linear_grpo_loss`` over its three bare GEMMs into existing memory: 6 N H V operations."""
    torch.manual_seed(0)
    shape = (8, tokens // 8)
    hidden, weight = _head(shape, hidden_size, vocab, device)
    rows = hidden.view(-1, hidden_size)
    ids, mask = torch.randint(vocab, shape, device=device), torch.ones(shape, device=device)
    advantages = torch.randn(8, device=device)
    quarter = advantages * (torch.arange(8, device=device) < 2)
    with torch.no_grad():
        old = linear_token_logprobs(hidden, weight, ids, backend="triton").logprobs
    logits, dx, dw = (
        torch.empty(tokens, vocab, dtype=HALF, device=device),
        torch.empty_like(rows),
        torch.empty_like(weight),
    )

    def gemms() -> None:
        torch.mm(rows, weight.t(), out=logits)
        torch.mm(logits, weight, out=dx)
        torch.mm(logits.t(), rows, out=dw)

    def ours(logits_dtype: torch.dtype, advantages: Tensor = advantages, head_grad: bool = True) -> Tensor:
        x, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_(head_grad)
        loss = linear_grpo_loss(x, w, ids, advantages, mask, old_logprobs=old, logits_dtype=logits_dtype,
                                backend="triton").loss  # fmt: skip
        loss.backward()
        return loss

    def logprobs(head_grad: bool) -> None:
        x, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_(head_grad)
        linear_token_logprobs(x, w, ids, logits_dtype=HALF, backend="triton").logprobs.sum().backward()

    names = {HALF: "bf16 workspace", SINGLE: "fp32 workspace"}
    contenders: dict[str, Work] = {GEMMS: gemms}
    for dtype, name in names.items():
        contenders[f"linear_grpo_loss, {name}"] = partial(ours, dtype)
        contenders[f"linear_grpo_loss, {name}, 1/4 live"] = partial(ours, dtype, quarter)
        contenders[f"linear_grpo_loss, {name}, frozen"] = partial(ours, dtype, head_grad=False)
    contenders |= {
        "linear_token_logprobs": partial(logprobs, True),
        "linear_token_logprobs, frozen": partial(logprobs, False),
    }
    comparison = Comparison(f"hidden states to loss, dX, dW, N={tokens} H={hidden_size} V={vocab} bfloat16", GEMMS)
    try:
        theirs = _trl(hidden, weight, ids, mask, old)
    except ImportError as error:
        comparison.notes.append(f"TRL's chunked head left out: {error}")
    else:
        torch.testing.assert_close(theirs(advantages), ours(HALF), rtol=2e-2, atol=1e-3)
        contenders |= {"TRL's chunked head": partial(theirs, advantages)}
        contenders |= {"TRL's chunked head, 1/4 live": partial(theirs, quarter)}
    if hidden_size >= 4096:
        comparison.targets = {f"linear_grpo_loss, {name}, frozen": 0.75 for name in names.values()}
        comparison.targets |= {f"linear_grpo_loss, {name}, 1/4 live": 0.6 for name in names.values()}
        comparison.targets |= {"linear_grpo_loss, bf16 workspace": 1.10, "linear_grpo_loss, fp32 workspace": 1.15}
    time_in_turns(comparison, contenders, {}, rounds, device)
    if "TRL's chunked head" in contenders:
        for suffix, asked in (("", 1.3), (", 1/4 live", 2.4)):
            ratio = comparison.median("TRL's chunked head" + suffix)
            ratio /= comparison.median("linear_grpo_loss, bf16 workspace" + suffix)
            comparison.notes.append(f"TRL over ours, bf16 workspace{suffix}: {ratio:.2f}x (asked: {asked}x)")
    return comparison


def _head(shape: tuple[int, ...], hidden_size: int, vocab: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Hidden states and a weight whose logits are of the size that models have."""
    hidden = torch.empty(*shape, hidden_size, dtype=HALF, device=device).normal_()
    weight = torch.empty(vocab, hidden_size, dtype=HALF, device=device).normal_(0, 2 / hidden_size**0.5)
    return hidden, weight


def _trl(hidden: Tensor, weight: Tensor, ids: Tensor, mask: Tensor, old: Tensor) -> Callable[[Tensor], Tensor]:
    """The same loss from TRL's head and the formula of its trainer."""
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

    def loss(advantages: Tensor) -> Tensor:
        x, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        found = _ChunkedLogProbFunction.apply(
            x.view(-1, x.shape[-1]), w, None, ids.view(-1), 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("entropy",)
        )
        ratio = torch.exp(found[0].view(ids.shape) - old)
        surrogate = torch.minimum(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None])
        loss = -(surrogate * mask).sum() / mask.sum()
        loss.backward()
        return loss.detach()

    return loss


def accuracy(sizes: Sizes, device: torch.device) -> list[dict[str, Any]]:
    """Errors against fp64 on the same bf16 hidden states and weight, beside those of whole fp32 logits."""
    _, hidden_size, vocab = sizes.heads[0]
    hidden, weight = _head((1, sizes.exact_tokens), hidden_size, vocab, device)
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


def comparisons(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Callable[[int], Comparison]]]:
    """Every comparison by name, as a function of the number of rounds."""
    for tokens, hidden_size, vocab in sizes.heads:
        what = f"from hidden states, H={hidden_size}"
        yield what, partial(from_hidden, tokens, hidden_size, vocab, device)
    for dtype, tokens, vocab in sizes.logits:
        yield f"from logits, {str(dtype)[6:]}, V={vocab}", partial(from_logits, dtype, tokens, vocab, device)
