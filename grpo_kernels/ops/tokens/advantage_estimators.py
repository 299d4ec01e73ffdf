"""The advantage estimators other than GRPO's. They need no kernels, because a batch has few rewards.

Each takes the rewards of whole groups. NaN marks a missing reward, which enters no baseline.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_kernels.ops.tokens.reference import all_equal, nanstd

_WHITEN_EPS = 1e-8  # added to the variance


@dataclass(frozen=True)
class Groups:
    """The inputs of an estimator.

    Args:
        rewards: ``[groups, G]``.
        lengths: Tokens of each completion, ``[groups, G]``, for the estimators in ``NEED_LENGTHS``.
        baselines: Reward of each prompt's greedy completion, ``[groups]``, for "remax".
        is_scaled: Whether "passk" divides by the group's deviation.
        eps: Added to that deviation.
    """

    rewards: Tensor
    lengths: Tensor
    baselines: Tensor
    is_scaled: bool
    eps: float

    @property
    def centred(self) -> Tensor:
        """``r - mean_group r``; 0 in a group whose rewards are all equal."""
        return torch.where(all_equal(self.rewards), 0, self.rewards - self.rewards.nanmean(-1, keepdim=True))


def dr_grpo(groups: Groups) -> Tensor:  # -> [groups, G]
    """``r - mean_group r``: Dr. GRPO (arXiv:2503.20783)."""
    return groups.centred


def rloo(groups: Groups) -> Tensor:
    """``r_i - mean_{j != i} r_j``: leave one out (arXiv:2402.14740)."""
    count = (~groups.rewards.isnan()).sum(-1, keepdim=True)
    return groups.centred * count / (count - 1).clamp(min=1)


def gpg(groups: Groups) -> Tensor:
    """``(r - mean_group r) B / |{r != 0}|``: GPG (arXiv:2504.02546)."""
    present = ~groups.rewards.isnan()
    nonzero = (present & (groups.rewards != 0)).sum().clamp(min=1)
    return groups.centred * present.sum() / nonzero


def passk(groups: Groups) -> Tensor:
    """The best of a group gets its lead over the second best, divided by the deviation; others 0 (arXiv:2503.19595)."""
    best, which = groups.rewards.nan_to_num(nan=-torch.inf).topk(2, -1)
    lead = best[:, :1] - best[:, 1:]
    lead = torch.where(lead.isfinite(), lead, 0)  # a single reward has none
    if groups.is_scaled:
        lead = lead / (nanstd(groups.rewards) + groups.eps)
    return torch.zeros_like(groups.rewards).scatter(-1, which[:, :1], lead)


def opo(groups: Groups) -> Tensor:
    """``r - sum(l r) / sum(l)`` over the group, with the completions' lengths ``l``: OPO (arXiv:2505.23585)."""
    rewards = groups.rewards
    lengths = torch.where(rewards.isnan(), 0, groups.lengths)
    total = (lengths * rewards.nan_to_num(nan=0.0)).sum(-1, keepdim=True)
    return torch.where(all_equal(rewards), 0, rewards - total / lengths.sum(-1, keepdim=True).clamp(min=1))


def remax(groups: Groups) -> Tensor:
    """``r - b`` with ``b`` the reward of the prompt's greedy completion: ReMax (arXiv:2310.10505)."""
    return groups.rewards - groups.baselines[:, None]


def reinforce_plus_plus(groups: Groups) -> Tensor:
    """Rewards whitened over the batch's tokens: REINFORCE++ (arXiv:2501.03262)."""
    return _whitened(groups.rewards, groups.lengths)


def reinforce_plus_plus_baseline(groups: Groups) -> Tensor:
    """``r - mean_group r``, whitened over the batch's tokens."""
    return _whitened(groups.centred, groups.lengths)


def _whitened(values: Tensor, lengths: Tensor) -> Tensor:
    """Centred and divided by the unbiased deviation. Each value counts as often as its completion has tokens."""
    lengths = torch.where(values.isnan(), 0, lengths)
    total, finite = lengths.sum(), values.nan_to_num(nan=0.0)
    mean = (lengths * finite).sum() / total.clamp(min=1)
    variance = (lengths * (finite - mean).square()).sum() / (total - 1).clamp(min=1)
    return torch.where(all_equal(values.reshape(1, -1)), 0, (values - mean) * (variance + _WHITEN_EPS).rsqrt())


ESTIMATORS: dict[str, Callable[[Groups], Tensor]] = {
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "gpg": gpg,
    "passk": passk,
    "opo": opo,
    "remax": remax,
    "reinforce++": reinforce_plus_plus,
    "reinforce++_baseline": reinforce_plus_plus_baseline,
}
NEED_LENGTHS = ("opo", "reinforce++", "reinforce++_baseline")
NEED_TWO = ("rloo", "passk")  # completions of a prompt
