"""What the ops over rows of logits are given beside the logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_kernels.calls import Call
from grpo_kernels.dtypes import accumulation_dtype
from grpo_kernels.loss.config import LossCode
from grpo_kernels.loss.fields import TokenFields
from grpo_kernels.ops.rows.transform import Comparison, Transform


def statistics_dtypes(logits_dtype: torch.dtype, outputs: int) -> tuple[torch.dtype | None, ...]:
    """Of ``logprobs, lse, entropy, log_sum_sq_probs, mean_logits, is_top1``; None where not wanted.

    The log-sum-exp is fp64: the backward takes differences of logits from it, and an offset common to all logits
    would leave an fp32 one with few digits after the point.
    """
    dtype = accumulation_dtype(logits_dtype)
    extras = (x if outputs >> bit & 1 else None for bit, x in enumerate((dtype, dtype, torch.bool), 1))
    return (dtype, torch.float64, dtype, *extras)


def empty_statistics(like: Tensor, shape: tuple[int, ...], outputs: int) -> tuple[Tensor, ...]:
    """Memory for the statistics, of shape ``[0]`` where not wanted."""
    dtypes = statistics_dtypes(like.dtype, outputs)
    return tuple(like.new_empty((0,) if dtype is None else shape, dtype=dtype) for dtype in dtypes)


@dataclass(frozen=True)
class StatisticsCall(Call):
    """Whose statistics of rows ``[B, T or T + 1, V]`` are taken."""

    ids: Tensor  # [B, T]
    mask: Tensor | None  # [B, T]
    transform: Transform
    outputs: int  # bit i is set where OUTPUTS[i] is wanted


@dataclass(frozen=True)
class GradientCall(Call):
    """Statistics of rows, and the gradients of a loss by log-probability and entropy; each like the ids."""

    ids: Tensor  # [B, T]
    mask: Tensor | None
    logprobs: Tensor
    lse: Tensor  # fp64
    entropy: Tensor
    dlogprobs: Tensor | None
    dentropy: Tensor | None
    transform: Transform


@dataclass(frozen=True)
class GroupRewards(Call):
    """Rewards that become advantages on the way."""

    rewards: Tensor | None = None  # [S]
    num_generations: int = 1
    is_scaled: bool = False
    eps: float = 0.0


@dataclass(frozen=True)
class LossRowsCall(Call):
    """The loss of rows ``[B, T or T + 1, V]``."""

    ids: Tensor  # [B, T]
    fields: TokenFields  # of these tokens
    group: GroupRewards
    code: LossCode
    transform: Transform


@dataclass(frozen=True)
class DivergenceCall(Call):
    """Whose divergences are taken, and the gradients of a loss by log-probability, entropy and divergence."""

    ids: Tensor  # [B, T], like the next four
    mask: Tensor | None
    dlogprobs: Tensor | None
    dentropy: Tensor | None
    ddivergence: Tensor | None
    comparison: Comparison
