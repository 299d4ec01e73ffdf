"""What every provider is given: one batch of completions with its head, and the four things asked of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from naive import loss_of_logprobs
from torch import Tensor

#: Rows of logits that stand for a model: hidden size and vocabulary of its head.
HEADS = {
    "Qwen2.5-0.5B": (896, 151936),
    "Llama-3.1-8B": (4096, 128256),
    "Qwen3-32B": (5120, 151936),
    "DeepSeek-V3": (7168, 129280),
}
COMPLETIONS = 8
#: What a result may be off by against fp64: relative to its norm, log-probs in nats. Of the inputs' dtype.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Problem:
    """``COMPLETIONS`` completions of equal length, with logits or with hidden states and a head."""

    ids: Tensor  # [B, T]
    mask: Tensor  # [B, T]
    advantages: Tensor  # [B]
    old: Tensor  # [B, T], log-probs under the policy that sampled
    upstream: Tensor  # [B, T], a gradient of log-probs
    logits: Tensor | None = None  # [B, T, V]
    hidden: Tensor | None = None  # [B, T, H]
    weight: Tensor | None = None  # [V, H]
    frozen: bool = False  # the head, as under LoRA

    def with_leaves(self, logits: Tensor | None = None) -> Problem:
        """The same with fresh leaves; ``logits`` in the place of its own."""
        logits = self.logits if logits is None else logits
        leaf = {"logits": logits, "hidden": self.hidden, "weight": self.weight}
        given = {name: value.detach() for name, value in leaf.items() if value is not None}
        for name, value in given.items():
            value.requires_grad_(not (name == "weight" and self.frozen))
        return replace(self, **given)

    def to(self, dtype: torch.dtype) -> Problem:
        """Every floating-point tensor in another dtype."""
        moved = {n: v.to(dtype) for n, v in vars(self).items() if isinstance(v, Tensor) and v.is_floating_point()}
        return replace(self, **moved)

    def with_live(self, share: float) -> Problem:
        """The same where only a share of the completions has an advantage, and of the tokens a gradient."""
        live = torch.arange(COMPLETIONS, device=self.ids.device) < round(share * COMPLETIONS)
        return replace(self, advantages=self.advantages * live, upstream=self.upstream * live[:, None])


def head_problem(
    tokens: int,
    hidden_size: int,
    vocab: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    ragged: bool = False,
) -> Problem:
    """Hidden states and a head whose logits have the spread of a model's, 2; old log-probs near the current ones.

    Args:
        tokens: B T, a multiple of the completions.
        hidden_size: H.
        vocab: V.
        dtype: Of hidden states and head.
        device: Where.
        ragged: To check on: the end of some completions is masked, and some ratios are clipped, all clear of a bound.
    """
    batch = _batch(tokens, vocab, device, ragged)
    hidden = torch.empty(*batch.ids.shape, hidden_size, dtype=dtype, device=device).normal_()
    weight = torch.empty(vocab, hidden_size, dtype=dtype, device=device).normal_(0, 2 / hidden_size**0.5)
    if ragged:
        logits = hidden.double() @ weight.double().t()
        logprobs = logits.log_softmax(-1).gather(-1, batch.ids[..., None])[..., 0].float()
    else:  # of logits N(0, 2) the log-sum-exp is near log V + 2
        targets = weight[batch.ids.flatten()].view(hidden.shape)
        logprobs = (hidden.float() * targets.float()).sum(-1) - math.log(vocab) - 2
    return replace(batch, old=logprobs + batch.old, hidden=hidden, weight=weight)


def logits_problem(
    tokens: int,
    vocab: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    ragged: bool = False,
) -> Problem:
    """The same from logits; see ``head_problem``."""
    batch = _batch(tokens, vocab, device, ragged)
    logits = torch.empty(*batch.ids.shape, vocab, dtype=dtype, device=device).normal_(0, 2)
    lse = logits.double().logsumexp(-1) if ragged else math.log(vocab) + 2
    target = logits.gather(-1, batch.ids[..., None])[..., 0]
    return replace(batch, old=(target.double() - lse).float() + batch.old, logits=logits)


def _batch(tokens: int, vocab: int, device: torch.device | str, ragged: bool) -> Problem:
    torch.manual_seed(0)
    shape = (COMPLETIONS, tokens // COMPLETIONS)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, shape, generator=generator)
    mask = torch.ones(shape)
    if ragged:
        lengths = torch.randint(1, shape[1] + 1, (COMPLETIONS, 1), generator=generator)
        mask = (torch.arange(shape[1]) < lengths).float()
    noise = _clear_of_bounds(generator, shape) if ragged else 0.03 * torch.randn(shape, generator=generator)
    batch = (
        ids,
        mask,
        torch.randn(COMPLETIONS, generator=generator),
        noise,
        torch.randn(shape, generator=generator) / tokens,
    )
    return Problem(*(value.to(device) for value in batch))


def _clear_of_bounds(generator: torch.Generator, shape: tuple[int, int]) -> Tensor:
    """Differences of log-probs of which a third is clipped, none so near a bound that rounding could cross it."""
    far = torch.tensor([-0.5, -0.1, 0.0, 0.08, 0.4])[torch.randint(5, shape, generator=generator)]
    return far + 0.02 * (torch.rand(shape, generator=generator) - 0.5)


#: From a problem with fresh leaves to a loss, or to log-probs [B, T].
Function = Callable[[Problem], Tensor]


def loss(function: Function, problem: Problem, logits: Tensor | None = None) -> dict[str, Tensor]:
    """The loss and the gradients of what it was computed from; ``logits``: where a provider may write over them."""
    given = problem.with_leaves(logits)
    value = function(given)
    value.backward()
    return {"loss": value.detach()} | _gradients(given)


def logprobs(function: Function, problem: Problem, logits: Tensor | None = None) -> dict[str, Tensor]:
    """Log-probs alone, as the passes for old and reference log-probs take them."""
    with torch.no_grad():
        return {"logprobs": function(problem)}


def upstream(function: Function, problem: Problem, logits: Tensor | None = None) -> dict[str, Tensor]:
    """Log-probs and the gradients under a gradient of them that the provider cannot know."""
    given = problem.with_leaves(logits)
    value = function(given)
    value.backward(problem.upstream)
    return {"logprobs": value.detach()} | _gradients(given)


def _gradients(given: Problem) -> dict[str, Tensor]:
    leaves = {"dlogits": given.logits, "dX": given.hidden, "dW": given.weight}
    return {name: leaf.grad for name, leaf in leaves.items() if leaf is not None and leaf.grad is not None}


#: What is asked, by name: the run around a provider's function. "logits" and "hidden" are the loss from either.
TASKS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "logits": loss,
    "hidden": loss,
    "logprobs": logprobs,
    "upstream": upstream,
}


def exact(task: str) -> Function:
    """The equation, in the dtype of what it is given."""

    def function(problem: Problem) -> Tensor:
        logits = problem.hidden @ problem.weight.t() if problem.logits is None else problem.logits
        found = logits.log_softmax(-1).gather(-1, problem.ids[..., None])[..., 0]
        return (
            loss_of_logprobs(found, problem.old, problem.advantages, problem.mask)
            if task in ("logits", "hidden")
            else found
        )

    return function


def buffer(problem: Problem, padded: bool = False) -> Tensor | None:
    """Memory that a provider may write its gradient over, [B, T, V], or [B, T + 1, V] as Hugging Face's models give."""
    if problem.logits is None:
        return None
    batch, length, vocab = problem.logits.shape
    return problem.logits.new_zeros(batch, length + padded, vocab)


def buffers(problem: Problem) -> dict[bool, Tensor]:
    """What ``buffer`` gives for logits, by ``padded``, in one memory for all who take turns."""
    whole = buffer(problem, padded=True)
    return {True: whole, False: whole.view(-1)[: problem.logits.numel()].view_as(problem.logits)}


def refill(work: Tensor, problem: Problem) -> None:
    """Puts the logits back where a gradient was written."""
    work[:, : problem.logits.shape[1]].copy_(problem.logits)


def errors(function: Function, task: str, problem: Problem, padded: bool = False) -> dict[str, float]:
    """What a provider is off by against fp64 on the same inputs: log-probs in nats, the rest relative to its norm."""
    work = buffer(problem, padded)
    if work is not None:
        refill(work, problem)
    got, baseline = TASKS[task](function, problem, work), TASKS[task](exact(task), problem.to(torch.float64))
    mask = problem.mask != 0
    found = {}
    for name, y in baseline.items():
        value = got[name][:, : y.shape[1]] if name == "dlogits" else got[name]
        difference = value.double() - y
        if name == "logprobs":
            found[name] = difference[mask].abs().max().item()
        elif name == "loss":  # its terms may cancel, and what is left says nothing of their errors
            found[name] = (difference.abs() / y.abs().clamp(min=problem.advantages.abs().mean().item())).item()
        else:
            found[name] = (difference.norm() / y.norm()).item()
    return found
