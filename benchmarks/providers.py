"""Who else turns hidden states into the GRPO loss: by their own functions, at equal settings, checked before timed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from naive import naive_grpo_loss
from torch import Tensor

#: Of hidden states [B, T, H], head [V, H], ids, advantages [B], mask and old log-probs [B, T].
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
#: What a provider's loss and gradients may be off by, relative to their norms, on a small problem in fp32.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Provider:
    """A way to the clipped loss at epsilon 0.2, averaged over tokens.

    Args:
        name: As tables call it.
        load: Gives the loss; raises where it is not installed or cannot run.
    """

    name: str
    load: Callable[[], Loss]


def _loss_of_logprobs(logprobs: Tensor, advantages: Tensor, mask: Tensor, old: Tensor) -> Tensor:
    """What every provider of log-probabilities leaves to torch, as TRL's trainer has it."""
    ratio = torch.exp(logprobs - old)
    surrogate = torch.minimum(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None])
    return -(surrogate * mask).sum() / mask.sum()


def _naive() -> Loss:
    return lambda x, w, ids, advantages, mask, old: naive_grpo_loss(x @ w.t(), ids, advantages, mask, old)


def _torch() -> Loss:
    function = torch.nn.functional.linear_cross_entropy  # torch 2.13 and newer

    def loss(x: Tensor, w: Tensor, ids: Tensor, advantages: Tensor, mask: Tensor, old: Tensor) -> Tensor:
        losses = function(x.flatten(0, 1), w, ids.flatten(), reduction="none")
        return _loss_of_logprobs(-losses.view(ids.shape), advantages, mask, old)

    return loss


def _trl() -> Loss:
    from trl.kernels import ChunkedLogProbFunction

    def loss(x: Tensor, w: Tensor, ids: Tensor, advantages: Tensor, mask: Tensor, old: Tensor) -> Tensor:
        found = ChunkedLogProbFunction.apply(
            x.flatten(0, 1), w, None, ids.flatten(), 1.0, 32768, None, 1.0, ("log_probs", "entropy")
        )
        return _loss_of_logprobs(found[0].view(ids.shape), advantages, mask, old)

    return loss


def _liger() -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    module = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="bnpo")

    def loss(x: Tensor, w: Tensor, ids: Tensor, advantages: Tensor, mask: Tensor, old: Tensor) -> Tensor:
        return module(x, w, ids, mask, advantages, old_per_token_logps=old)[0]

    return loss


PROVIDERS = (
    Provider("naive PyTorch", _naive),
    Provider("torch linear_cross_entropy", _torch),
    Provider("TRL 1.16's head", _trl),
    Provider("Liger 0.8.5", _liger),
)
_NEEDS = {"TRL 1.16's head": "trl", "Liger 0.8.5": "liger_kernel"}


def checked(rival: Provider) -> tuple[Loss | None, str]:
    """A provider's loss, or None and why: it is not installed, does not run, or is wrong, and by how much."""
    module = _NEEDS.get(rival.name)
    if module is not None and importlib.util.find_spec(module) is None:
        return None, f"{rival.name}: {module} is not installed"
    try:
        loss = rival.load()
        errors = _errors(loss)
    except Exception as error:  # whatever another package raises is a row of the table
        return None, f"{rival.name}: {type(error).__name__}: {error}"
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE}
    if wrong:
        return None, f"{rival.name} is wrong: " + ", ".join(
            f"{name} off by {error:.2g}" for name, error in wrong.items()
        )
    return loss, ""


def _errors(loss: Loss) -> dict[str, float]:
    """Relative errors of the loss and its gradients against fp64, on a small problem with masked tokens."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(shape, generator=generator) for shape in ((4, 6, 16), (997, 16)))
    ids = torch.randint(997, (4, 6), generator=generator)
    mask = (torch.arange(6) < torch.tensor([[6], [4], [1], [5]])).float()
    advantages = torch.randn(4, generator=generator)
    logprobs = (hidden @ weight.t()).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    old = logprobs + 0.3 * torch.randn(4, 6, generator=generator)

    def results(function: Loss, dtype: torch.dtype) -> dict[str, Tensor]:
        x, w = (value.clone().to(dtype).requires_grad_() for value in (hidden, weight))
        value = function(x, w, ids, advantages.to(dtype), mask.to(dtype), old.to(dtype))
        value.backward()
        return {"loss": value.detach(), "dX": x.grad, "dW": w.grad}

    def exact(x: Tensor, w: Tensor, ids: Tensor, advantages: Tensor, mask: Tensor, old: Tensor) -> Tensor:
        logprobs = (x @ w.t()).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        return _loss_of_logprobs(logprobs, advantages, mask, old)

    got, baseline = results(loss, torch.float32), results(exact, torch.float64)
    return {name: ((got[name].double() - y).norm() / y.norm()).item() for name, y in baseline.items()}
