"""What a generation is measured by, under TRL's names: over the completions of all processes, in fp64.

Departures from TRL's trainer, which takes means of fp32 and of means:

- ``frac_reward_zero_std`` is the share of groups whose rewards are exactly equal, those that dynamic sampling leaves
  out (``informative_groups``). TRL takes an fp32 deviation of up to 1e-8 for zero, which that of rewards of 1.2
  exceeds, and no group of fewer than two rewards; with ``scale_rewards="batch"`` and
  ``multi_objective_aggregation="normalize_then_sum"`` it takes the whole batch's deviation.
- A completion that the length limit cut off at a pad token counts as cut off.
- ``kl``, ``entropy``, ``clip_ratio/*`` and the like are of an optimizer step as one batch (``PolicyMetrics``). TRL's
  are means over micro-batches: a token of a short one counts for more, and its extrema are means of extrema.
- ``sampling/*`` are of all processes as one, where TRL takes means over processes, and a completion without a token has
  no ratio, where TRL gives it 1.
- What is measured once a generation is repeated at each of its optimizer steps.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor

from grpo_kernels import GRPOLossConfig, Sequences, rollout_weights
from grpo_kernels.ops.tokens.reference import all_equal, nanstd
from grpo_kernels.rewards import total

_LOGGER = logging.getLogger(__name__)
_SILENT_GENERATIONS = 10  # of a run, after which it ends if nothing was scored


def informative_groups(
    rewards: Tensor,  # [B, K]
    num_generations: int,
    weights: Sequence[float] | None,
    aggregation: str,
) -> Tensor:  # [B // num_generations], bool
    """Which groups have rewards that differ, and so a gradient: DAPO eq. 11 (arXiv:2503.14476).

    Compared is what advantages are made of: the weighted sum of the functions, or with "normalize_then_sum" every
    function that has a weight.

    Args:
        rewards: Of K functions, group after group; NaN, where one abstained, counts for nothing.
        num_generations: Completions in a group.
        weights: Of the functions; None means 1.
        aggregation: TRL's ``multi_objective_aggregation``.
    """
    if aggregation == "sum_then_normalize":
        columns = total(rewards, weights)[:, None]
    else:
        columns = rewards if weights is None else rewards * (torch.tensor(weights) != 0)
    differs = [~all_equal(column.reshape(-1, num_generations))[:, 0] for column in columns.unbind(dim=1)]
    return torch.stack(differs).any(dim=0)


def reward_metrics(
    rewards: Tensor,  # [B, K]
    names: Sequence[str],  # of the K reward functions
    num_generations: int,
    weights: Sequence[float] | None,
    aggregation: str,
) -> dict[str, float]:
    """Mean and unbiased deviation of the weighted sum and of each function, without what is NaN, and the share of
    groups whose rewards are equal. A mean of nothing is NaN, and so is a deviation of fewer than two: null in files.

    Args:
        rewards: Of whole groups, on the host; NaN where a function abstained.
        names: Under which a function's are shown.
        num_generations: Completions in a group.
        weights: Of the functions; None means 1.
        aggregation: TRL's ``multi_objective_aggregation``: what advantages are made of.
    """
    totals = total(rewards, weights)
    differs = informative_groups(rewards, num_generations, weights, aggregation)
    metrics = {
        "reward": _mean(totals),
        "reward_std": _deviation(totals),
        "frac_reward_zero_std": (~differs).double().mean().item(),
    }
    for k, name in enumerate(names):
        metrics |= {f"rewards/{name}/mean": _mean(rewards[:, k]), f"rewards/{name}/std": _deviation(rewards[:, k])}
    return metrics


def length_metrics(lengths: Tensor, ended: Tensor) -> dict[str, float]:  # [B], [B] bool
    """Tokens of all completions, and of those that ended by themselves, 0 where none did; the share of the others."""
    metrics = {}
    for name, values in (("length", lengths), ("terminated_length", lengths[ended])):
        values = values.double() if len(values) else torch.zeros(1, dtype=torch.float64)
        for statistic, value in (("mean", values.mean()), ("min", values.min()), ("max", values.max())):
            metrics[f"completions/{statistic}_{name}"] = value.item()
    return metrics | {"completions/clipped_ratio": (~ended).double().mean().item()}


def mean_of_logged(parts: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """The means of what reward functions logged in each process."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: fmean(value for part in parts for value in part.get(name, ())) for name in names}


def _mean(values: Tensor) -> float:
    return values.double().nanmean().item()


def _deviation(values: Tensor) -> float:
    return nanstd(values.double()[None]).item() if (~values.isnan()).sum() > 1 else math.nan


class SilentRewards:
    """Tells of reward functions that return nothing but None.

    Args:
        names: Of the functions.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._warned: set[str] = set()
        self._generations, self._has_scored = 0, False

    def note(self, rewards: Tensor, step: int) -> None:  # [B, K]
        """Warns of each function that scored no completion of a generation, once.

        Raises:
            ValueError: None of them has scored anything in the first generations of the run.
        """
        self._generations += 1
        is_silent = rewards.isnan().all(dim=0)
        self._has_scored |= not bool(is_silent.all())
        for name in (name for name, silent in zip(self.names, is_silent.tolist(), strict=True) if silent):
            if name not in self._warned:
                self._warned.add(name)
                _LOGGER.warning("step %d: reward function %r returned None for all %d completions",
                                step, name, len(rewards))  # fmt: skip
        if self._generations == _SILENT_GENERATIONS:
            self.raise_if_all_silent()

    def raise_if_all_silent(self) -> None:
        """Raises ValueError where nothing was scored: there was nothing to learn from."""
        if self._generations and not self._has_scored:
            raise ValueError(
                f"no completion of {self._generations} generations has a reward: {', '.join(self.names)} returned None "
                "for all of them"
            )


def correction_statistics(
    old_logprobs: Tensor,  # [B, T]
    sampling_logprobs: Tensor,  # [B, T]
    mask: Tensor,  # [B, T]
    config: GRPOLossConfig,
) -> Tensor:  # [B, 7]
    """Of each completion, for ``correction_metrics``.

    The tokens that the sampler scored, the sum and the largest of their differences of log-probabilities; the weights
    that correct them, one a token or, where it is the sequence's, one: how many, their sum, the least, the largest.
    """
    kept = mask.bool()
    scored = kept & ~sampling_logprobs.isnan()
    gap = torch.where(scored, (old_logprobs - sampling_logprobs).abs(), 0)
    ratios = rollout_weights(old_logprobs, sampling_logprobs, kept, Sequences.of(old_logprobs, None), config)
    low, high = ratios.masked_fill(~kept, torch.inf).amin(dim=1), ratios.masked_fill(~kept, -torch.inf).amax(dim=1)
    count, ratio_sum = kept.sum(dim=1), torch.where(kept, ratios, 0).sum(dim=1)
    if (config.rollout_correction or "").startswith("sequence"):
        count, ratio_sum = count.clamp(max=1), torch.where(count > 0, high, 0)
    columns = [scored.sum(dim=1), gap.sum(dim=1), gap.amax(dim=1), count, ratio_sum, low, high]
    return torch.stack([column.to(gap.dtype) for column in columns], dim=1)


def correction_metrics(statistics: Tensor) -> dict[str, float]:  # [B, 7]
    """TRL's metrics of how far the engine that sampled is from the model.

    Args:
        statistics: ``correction_statistics`` of all processes, on the host. A completion without a token has no part in
            them; without any there is none.
    """
    known = statistics[statistics[:, 3] > 0].double()
    if not len(known):
        return {}
    scored, gap, gap_max, ratios, ratio, low, high = known.unbind(dim=1)
    return {
        "sampling/sampling_logp_difference/mean": (gap.sum() / scored.sum().clamp(min=1)).item(),
        "sampling/sampling_logp_difference/max": gap_max.max().item(),
        "sampling/importance_sampling_ratio/min": low.min().item(),
        "sampling/importance_sampling_ratio/mean": (ratio.sum() / ratios.sum()).item(),
        "sampling/importance_sampling_ratio/max": high.max().item(),
    }
