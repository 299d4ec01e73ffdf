"""Means over tokens and completions, and the clipped losses that differ in their mean alone.

A new mean is a function here; a new loss type of that kind is a line of ``CLIPPED_LOSSES``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_kernels.loss.sequences import Sequences


@dataclass(frozen=True)
class TokenCounts:
    """What a mean divides by.

    Args:
        mask: Which tokens count, bool, ``[B, T]`` or ``[N]``.
        sequences: How they divide into completions.
        counts_empty: Whether completions without a token count.
        max_completion_length: The option.
        dtype: The dtype of the counts that are tensors.
    """

    mask: Tensor
    sequences: Sequences
    counts_empty: bool
    max_completion_length: int | None
    dtype: torch.dtype

    def tokens(self) -> Tensor:  # []
        return self.mask.sum(dtype=self.dtype)

    def lengths(self) -> Tensor:  # [S]
        return self.sequences.lengths(self.mask, self.dtype)

    def completions(self) -> int | Tensor:  # []
        return max(self.sequences.count, 1) if self.counts_empty else (self.lengths() > 0).sum(dtype=self.dtype)


Divisors = tuple[int | Tensor, ...]  # their product divides: each [S], [] or a number


def _token_mean(counts: TokenCounts) -> Divisors:
    return (counts.tokens(),)


def _sequence_mean_token_mean(counts: TokenCounts) -> Divisors:
    return counts.completions(), counts.lengths()


def _sequence_mean_token_sum(counts: TokenCounts) -> Divisors:
    return (counts.completions(),)


def _sequence_mean_token_sum_norm(counts: TokenCounts) -> Divisors:
    if counts.max_completion_length is None:
        raise ValueError("max_completion_length must be given, got None")
    return counts.completions(), counts.max_completion_length


#: By verl's names, what a completion's tokens are divided by.
AGGREGATIONS: dict[str, Callable[[TokenCounts], Divisors]] = {
    "token-mean": _token_mean,
    "seq-mean-token-mean": _sequence_mean_token_mean,
    "seq-mean-token-sum": _sequence_mean_token_sum,
    "seq-mean-token-sum-norm": _sequence_mean_token_sum_norm,
}
#: Loss types with a clipped importance ratio, of a token or of a sequence, and the mean of each.
CLIPPED_LOSSES = {
    "grpo": "seq-mean-token-mean",
    "bnpo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
    "dapo": "token-mean",
    "luspo": "seq-mean-token-sum",
    "ppo": "token-mean",
    "clip_cov": "token-mean",
}
