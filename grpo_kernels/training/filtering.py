"""Which problems and groups are worth training on: the pass-rate filter, and DAPO's dynamic sampling.

A group whose rewards are all equal has zero advantages, and so no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_kernels.training.tasks import Row


def pass_rate_filter(rows: Sequence[Row], rates: Sequence[float], low: float = 0.0, high: float = 1.0) -> list[Row]:
    """The rows whose pass rate lies strictly between two bounds.

    With the bounds 0 and 1 it drops the problems that the model always or never solves.

    Args:
        rows: P problems.
        rates: The share of right answers to each, between 0 and 1.
        low: A row must have more.
        high: A row must have less.

    Raises:
        ValueError: There is not one rate per row, a rate is not between 0 and 1, or ``low`` is not below ``high``.

    Example:
        >>> pass_rate_filter([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}], [0.0, 0.25, 1.0])
        [{'prompt': 'b'}]
    """
    if len(rates) != len(rows):
        raise ValueError(f"rates must have one rate per row ({len(rows)}), got {len(rates)}")
    if not low < high:
        raise ValueError(f"low must be less than high, got {low} and {high}")
    for i, rate in enumerate(rates):
        if not 0 <= rate <= 1:
            raise ValueError(f"rates must be between 0 and 1, got {rate} for row {i}")
    return [row for row, rate in zip(rows, rates, strict=True) if low < rate < high]


def informative_groups(
    rewards: Tensor,  # [B]
    num_generations: int,
) -> Tensor:  # [B // num_generations], bool
    """Which groups have rewards that differ, and so a gradient: DAPO eq. 11 (arXiv:2503.14476).

    Dynamic sampling keeps these and samples further prompts until a batch is full of them.

    Args:
        rewards: One per completion, group after group. NaN, where no function scored, counts for nothing.
        num_generations: Completions in a group.

    Raises:
        TypeError: The rewards are not floating point.
        ValueError: They are not one per completion of whole groups.

    Example:
        >>> informative_groups(torch.tensor([1.0, 1.0, 0.0, 1.0]), 2)
        tensor([False,  True])
    """
    if not rewards.is_floating_point():
        raise TypeError(f"rewards must be floating point, got {rewards.dtype}")
    if num_generations < 1 or rewards.dim() != 1 or len(rewards) % num_generations:
        raise ValueError(
            f"rewards must have shape [B], B a multiple of num_generations ({num_generations}), "
            f"got {list(rewards.shape)}"
        )
    groups = rewards.reshape(-1, num_generations)
    unscored = groups.isnan()
    highest = groups.masked_fill(unscored, -torch.inf).amax(dim=1)
    lowest = groups.masked_fill(unscored, torch.inf).amin(dim=1)
    return highest > lowest
