"""The public ``gae`` and its registered ops."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels import backends
from grpo_kernels.loss.sequences import Sequences
from grpo_kernels.named_arguments import check_keywords
from grpo_kernels.ops.registration import define, lazy_import
from grpo_kernels.ops.tokens import reference
from grpo_kernels.validation import (
    check_cu_seqlens,
    check_device,
    check_float,
    check_mask,
    check_number,
    check_real,
    check_shape,
)


class GAEOutput(NamedTuple):
    """Advantages, and returns: the targets of the value function. Both like the rewards; 0 where masked."""

    advantages: Tensor
    returns: Tensor


_OPS = define(
    "gae",
    {"rewards": "Tensor", "values": "Tensor", "mask": "Tensor", "offsets": "Tensor", "gamma": "float", "lam": "float"},
    "Tensor",
    lambda rewards, values, mask, offsets, gamma, lam: torch.empty_like(values),
    {"triton": lazy_import("grpo_kernels.ops.tokens.triton.gae", "gae")},
)


@check_keywords()
def gae(
    rewards: Tensor,  # [B, T]; packed [N]
    values: Tensor,  # like rewards
    completion_mask: Tensor,  # like rewards
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    cu_seqlens: Tensor | None = None,  # [S + 1]
    debug: bool = False,
    backend: str = "auto",
) -> GAEOutput:
    """Generalised advantage estimation: PPO's advantages from a value function, by a backward scan of each completion.

        delta_t = r_t + gamma V_(t+1) - V_t        A_t = delta_t + gamma lam A_(t+1)        R_t = A_t + V_t

    Example:
        >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]])
        >>> gae(rewards, values, torch.ones(1, 2), lam=1.0).advantages
        tensor([[0.5000, 0.5000]])

    arXiv:1506.02438 eq. 16. Arithmetic is fp64 in a completion, and results are fp32, or fp64 for fp64 input. Not
    differentiable; whitening over the batch, which PPO adds, is the caller's.

    Args:
        rewards: Of each token, unitless. An outcome reward belongs to the last token.
        values: The value function at each token, before it is chosen.
        completion_mask: 0 excludes a token (a tool's output, padding), whatever the other inputs hold there. The scan
            goes from one unmasked token to the next.
        gamma: Discount.
        lam: Weight of longer returns over the value function, between 0 and 1.
        cu_seqlens: Where each packed completion begins, and the end.
        debug: Read the values of ``cu_seqlens`` on a GPU too: syncs.
        backend: "auto", or one of ``grpo_kernels.BACKENDS``.

    Raises:
        TypeError: A tensor has a dtype that does not fit.
        ValueError: Shapes or devices do not fit, or ``gamma`` or ``lam`` is not between 0 and 1.
        RuntimeError: The named backend cannot run here.
    """
    check_real("rewards", rewards)
    if rewards.dim() not in (1, 2):
        raise ValueError(f"rewards must have shape [B, T] or, packed, [N], got {list(rewards.shape)}")
    check_float("values", values)
    check_shape("values", values, rewards.shape)
    check_mask("completion_mask", completion_mask)
    check_shape("completion_mask", completion_mask, rewards.shape)
    check_device(rewards.device, [("values", values), ("completion_mask", completion_mask), ("cu_seqlens", cu_seqlens)])
    check_cu_seqlens(cu_seqlens, rewards, debug)
    for name, value in (("gamma", gamma), ("lam", lam)):
        check_number(name, value)
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value!r}")
    backend = backends.resolve("gae", backend, rewards.device)
    with torch.no_grad():
        dtype = torch.float64 if torch.float64 in (rewards.dtype, values.dtype) else torch.float32
        mask = completion_mask != 0
        dense = [torch.where(mask, x.to(dtype), 0).reshape(-1).contiguous() for x in (rewards, values)]
        offsets = Sequences.of(rewards, cu_seqlens).offsets
        function = reference.gae if backend == "torch" else _OPS[backend]
        advantages = function(*dense, mask.reshape(-1).contiguous(), offsets, gamma, lam)
        returns = torch.where(mask.reshape(-1), advantages + dense[1], 0)
        return GAEOutput(advantages.view(rewards.shape), returns.view(rewards.shape))
