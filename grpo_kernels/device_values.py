"""Bad values that kernels met: kept on the device, for reading them back from a GPU would wait for it."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_NONE = 2**63 - 1
#: What is kept, in this order: the least flat index of each, or the least number.
_KINDS = (
    "an id outside the vocabulary where unmasked, at {}",
    "an infinite reward, at {}",
    "{} rows that may have a gradient, more than max_live_rows",
    "an unmasked token whose loss is infinite, at {}",
)
_LIVE_ROWS, _INFINITE = 2, 3


@cache
def first_bad(device: torch.device) -> Tensor:  # [4] int64
    """The least of each bad value since ``check_device_values`` was last called."""
    return torch.full((len(_KINDS),), _NONE, dtype=torch.int64, device=device)


def note_live_rows(count: Tensor, bound: int) -> None:
    """Keeps a number of rows that passes its bound; on a CPU, where reading it costs nothing, refuses it at once."""
    if count.device.type == "cpu":
        if count > bound:
            raise ValueError(f"max_live_rows must be at least {count.item()}, the rows that may be live, got {bound}")
        return
    kept = first_bad(count.device)[_LIVE_ROWS]
    kept.copy_(torch.where(count > bound, torch.minimum(kept, count), kept))


def note_infinite(is_infinite: Tensor) -> None:
    """Keeps the least index of a token without a bound. No sync; nothing is kept of what is traced or transformed."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or is_infinite.numel() == 0:
        return
    kept = first_bad(is_infinite.device)[_INFINITE]
    index = is_infinite.reshape(-1).to(torch.uint8).argmax()
    kept.copy_(torch.where(is_infinite.any(), torch.minimum(kept, index), kept))


def check_device_values(device: torch.device) -> None:
    """Raises if a kernel on ``device`` met a bad value since this was last called. One sync.

    Kernels read nothing out of bounds and go on: an id outside the vocabulary is held at its end, an infinite reward
    leaves its group without advantages, and a loss without a bound is infinite. Call it once a step, or once in a
    while; ``debug=True`` calls it for you.

    Args:
        device: Where the tensors were. On a CPU ids and rewards are checked before anything runs.

    Raises:
        ValueError: There was one; the message gives the flat index of the first in its tensor.
    """
    device = torch.empty(0, device=device).device  # "cuda" names the current device
    kept = first_bad(device)
    found = [(kind, index) for kind, index in zip(_KINDS, kept.tolist(), strict=True) if index != _NONE]
    if found:
        kept.fill_(_NONE)
        raise ValueError(
            "; ".join(f"an earlier call on {device} was given {kind.format(index)}" for kind, index in found)
        )
