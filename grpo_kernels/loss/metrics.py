"""Training metrics as one tensor of sums, counts and extrema, read under TRL's names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum

import torch
from torch import Tensor
from torch import distributed as dist


class Partial(IntEnum):
    """Position of each sum, count and extremum; mirrored in policy_math.h."""

    TOKENS = 0  # unmasked tokens
    RATIOS = 1  # importance ratios: tokens, or sequences at sequence level
    KL = 2
    ENTROPY = 3
    LOW = 4  # clipped below, with a negative advantage
    HIGH = 5  # clipped above, with a positive advantage
    LOW_MIN = 6  # extrema of the sequences' clipped shares
    HIGH_MAX = 7
    PHI = 8  # sum of the sequences' mean phi; this and the next are appended for "vespo", outside of kernels
    SEQUENCES = 9


#: Number of partials that kernels return.
KERNEL_PARTIALS = Partial.PHI
_MEANS = {
    "kl": (Partial.KL, Partial.TOKENS),
    "entropy": (Partial.ENTROPY, Partial.TOKENS),
    "clip_ratio/low_mean": (Partial.LOW, Partial.RATIOS),
    "clip_ratio/high_mean": (Partial.HIGH, Partial.RATIOS),
    "cispo_clip_ratio": (Partial.HIGH, Partial.RATIOS),
    "vespo/phi_seq_mean": (Partial.PHI, Partial.SEQUENCES),
}
_EXTREMA = {"clip_ratio/low_min": Partial.LOW_MIN, "clip_ratio/high_max": Partial.HIGH_MAX}
CLIP_METRICS = (
    "clip_ratio/low_mean",
    "clip_ratio/low_min",
    "clip_ratio/high_mean",
    "clip_ratio/high_max",
    "clip_ratio/region_mean",
)


class PolicyMetrics(Mapping[str, Tensor]):
    """TRL's metric names to 0-dim tensors on the loss's device; reading one syncs nothing.

    Args:
        partials: Sums, counts and extrema, in the order of ``Partial``.
        names: The metrics that the loss defines.
    """

    def __init__(self, partials: Tensor, names: tuple[str, ...]) -> None:
        self.partials = partials
        self.names = names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            names = ", ".join(map(repr, self.names)) or "none"
            raise KeyError(f"{name!r} is no metric of this loss, which has {names}")
        if name in _EXTREMA:
            value = self.partials[_EXTREMA[name]]
            return torch.where(value.isfinite(), value, 0)
        if name == "clip_ratio/region_mean":
            return self["clip_ratio/low_mean"] + self["clip_ratio/high_mean"]
        total, count = _MEANS[name]
        return self.partials[total] / self.partials[count].clamp(min=1)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        """Names and values. Reads them from the device, in one sync."""
        if isinstance(self.partials, torch._subclasses.FakeTensor) or self.partials.device.type == "meta":
            return f"PolicyMetrics({', '.join(self.names)})"
        values = torch.stack([self[name] for name in self.names]).tolist() if self.names else []
        shown = (f"{name!r}: {value:.6g}" for name, value in zip(self.names, values, strict=True))
        return f"PolicyMetrics({{{', '.join(shown)}}})"

    @staticmethod
    def combined(parts: Sequence[PolicyMetrics]) -> PolicyMetrics:
        """The metrics of one batch that consists of these micro-batches."""
        return PolicyMetrics(_combine(torch.stack([part.partials for part in parts])), parts[0].names)

    def reduce(self, group: dist.ProcessGroup | None = None) -> PolicyMetrics:
        """The metrics over all processes of ``group``, equal to those of one process with all the data.

        One collective. Needs an initialised ``torch.distributed``.
        """
        world = dist.get_world_size(group)
        gathered = self.partials.new_empty(world * self.partials.numel())
        dist.all_gather_into_tensor(gathered, self.partials, group=group)
        return PolicyMetrics(_combine(gathered.view(world, -1)), self.names)


def _combine(parts: Tensor) -> Tensor:  # [K, P] -> [P]
    """Adds sums and counts, and takes the extrema of extrema."""
    combined = parts.sum(0)
    combined[Partial.LOW_MIN] = parts[:, Partial.LOW_MIN].amin()
    combined[Partial.HIGH_MAX] = parts[:, Partial.HIGH_MAX].amax()
    return combined
