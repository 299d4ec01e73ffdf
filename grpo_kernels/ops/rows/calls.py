"""Arguments of the ops over rows of logits, beside the logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_kernels.calls import Call
from grpo_kernels.dtypes import accumulation_dtype
from grpo_kernels.loss.config import LossCode
from grpo_kernels.loss.fields import TokenFields
from grpo_kernels.ops.rows.transform import Comparison, Transform


def statistics_dtypes(logits_dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Dtypes of ``logprobs, lse, entropy, log_sum_sq_probs, mean_logits, is_top1``.

    The log-sum-exp is fp64, because the backward subtracts it from logits. If all logits have a large common offset, an
    fp32 log-sum-exp has too few digits after the point.
    """
    dtype = accumulation_dtype(logits_dtype)
    return dtype, torch.float64, dtype, dtype, dtype, torch.bool


def wanted_statistics(outputs: int) -> tuple[bool, ...]:
    """Which of the statistics are wanted: the first three always are."""
    return True, True, True, *(bool(outputs >> bit & 1) for bit in (1, 2, 3))


def empty_statistics(like: Tensor, shape: tuple[int, ...], outputs: int) -> tuple[Tensor, ...]:
    """Memory for the statistics, of shape ``[0]`` if not wanted."""
    pairs = zip(statistics_dtypes(like.dtype), wanted_statistics(outputs), strict=True)
    return tuple(like.new_empty(shape if wanted else (0,), dtype=dtype) for dtype, wanted in pairs)


@dataclass(frozen=True)
class StatisticsCall(Call):
    """Tokens whose statistics are computed, of rows ``[B, T or T + 1, V]``."""

    ids: Tensor  # [B, T]
    mask: Tensor | None  # [B, T]
    transform: Transform
    outputs: int  # bit i is set if OUTPUTS[i] is wanted


@dataclass(frozen=True)
class GradientCall(Call):
    """Statistics of tokens, and the upstream gradients of log-probabilities and entropies; each like the ids."""

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
    """Rewards from which the kernel computes advantages; none by default."""

    rewards: Tensor | None = None  # [S], one per completion
    num_generations: int = 1
    is_scaled: bool = False
    eps: float = 0.0


@dataclass(frozen=True)
class LossRowsCall(Call):
    """A loss of tokens, of rows ``[B, T or T + 1, V]``."""

    ids: Tensor  # [B, T]
    fields: TokenFields  # of these tokens
    group: GroupRewards
    code: LossCode
    transform: Transform


@dataclass(frozen=True)
class DivergenceCall(Call):
    """Tokens whose divergences are computed, and the upstream gradients of the results."""

    ids: Tensor  # [B, T], like the next four
    mask: Tensor | None
    dlogprobs: Tensor | None
    dentropy: Tensor | None
    ddivergence: Tensor | None
    comparison: Comparison
