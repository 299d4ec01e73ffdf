"""Flags for bad values that kernels find. They stay on the device, because reading them back would sync."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from grpo_kernels.named_arguments import check_keywords

_NONE = 2**63 - 1
#: The flags in order. Each holds the smallest flat index, or the smallest number of rows, that was bad.
_KINDS = (
    "an id outside the vocabulary where unmasked, at {}",
    "an infinite reward, at {}",
    "{} rows that may have a gradient, more than max_live_rows",
    "an unmasked token whose loss is infinite, at {}",
)
_LIVE_ROWS, _INFINITE = 2, 3


@cache
def first_bad(device: torch.device) -> Tensor:  # [4] int64
    """The flags of a device since the last ``check_device_values``."""
    return torch.full((len(_KINDS),), _NONE, dtype=torch.int64, device=device)


def flag_live_rows(count: Tensor, bound: int) -> None:
    """Flags a number of rows above its bound. On a CPU, where reading it costs nothing, raises instead."""
    if count.device.type == "cpu":
        if count > bound:
            raise ValueError(f"max_live_rows must be at least {count.item()}, the rows that may be live, got {bound}")
        return
    flag = first_bad(count.device)[_LIVE_ROWS]
    flag.copy_(torch.where(count > bound, torch.minimum(flag, count), flag))


def flag_infinite(is_infinite: Tensor) -> None:
    """Flags the first token with an infinite loss. No sync. Flags nothing during tracing or torch.func's transforms."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or is_infinite.numel() == 0:
        return
    flag = first_bad(is_infinite.device)[_INFINITE]
    index = is_infinite.reshape(-1).to(torch.uint8).argmax()
    flag.copy_(torch.where(is_infinite.any(), torch.minimum(flag, index), flag))


@check_keywords()
def check_device_values(device: torch.device) -> None:
    """Raises if a kernel on ``device`` found a bad value since the last call of this function. One sync.

    Example:
        >>> check_device_values(torch.device("cpu"))

    Kernels never read out of bounds, and continue after a bad value: an id outside the vocabulary is clamped, an
    infinite reward leaves its group without advantages, and an unbounded loss is infinite. Call this once a step or
    less often; ``debug=True`` calls it for you.

    Args:
        device: The device of the tensors. On a CPU, ids and rewards are checked before anything runs.

    Raises:
        ValueError: There was a bad value; the message gives the flat index of the first in its tensor.
    """
    device = torch.empty(0, device=device).device  # "cuda" names the current device
    flags = first_bad(device)
    bad = [(kind, index) for kind, index in zip(_KINDS, flags.tolist(), strict=True) if index != _NONE]
    if bad:
        flags.fill_(_NONE)
        raise ValueError(
            "; ".join(f"an earlier call on {device} was given {kind.format(index)}" for kind, index in bad)
        )
