"""Which tokens a head projects, in which order and how many at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_kernels.device_values import note_live_rows

#: A chunk with more dead rows than this is packed: below it moving the live ones costs more than their GEMMs save.
_WORTH_PACKING = 1 / 8


@dataclass(frozen=True)
class SelectedRows:
    """Tokens in the order in which they are projected: those that may have a gradient, then the other unmasked ones.

    Args:
        index: Which token each is; None where all are taken as they come, masked ones among them.
        live: How many may have a gradient.
        count: How many there are.
        device: Where they are.
        mask: The mask where masked tokens are among them.
    """

    index: Tensor | None  # [count]
    live: int
    count: int
    device: torch.device
    mask: Tensor | None = None  # [N]

    @classmethod
    def of(cls, mask: Tensor | None, live: Tensor | None, like: Tensor, max_live: int | None = None) -> SelectedRows:
        """The rows of ``like [N, ...]``. One sync, and none where a CUDA graph is captured: then all are taken.

        Args:
            mask: ``[N]`` bool; None where none is masked.
            live: ``[N]`` bool, which may have a gradient; None means all.
            like: Gives the number of rows and the device.
            max_live: At most so many may have one: no sync, and masked rows stay among the others, last.
        """
        rows = like.shape[0]
        if (mask is None and live is None) or (max_live is None and is_capturing(like.device)):
            return cls(None, rows, rows, like.device, mask)
        # 2 live, 1 dead, 0 masked
        unmasked = torch.ones(rows, dtype=torch.bool, device=like.device) if mask is None else mask
        kind = unmasked.to(torch.uint8) + (unmasked if live is None else unmasked & live)
        if max_live is not None:
            note_live_rows((kind == 2).sum(), max_live)
            order = kind.argsort(descending=True, stable=True)
            return cls(order, min(max_live, rows), rows, like.device, unmasked[order])
        n_live, count = torch.stack([(kind == 2).sum(), (kind > 0).sum()]).tolist()
        if n_live == rows:
            return cls(None, rows, rows, like.device)
        return cls(kind.argsort(descending=True, stable=True)[:count], n_live, count, like.device)

    def gather(self, values: Tensor) -> Tensor:  # [N, ...] -> [count, ...]
        """The values of these tokens, in this order."""
        return values if self.index is None else values[self.index]

    def scatter(self, values: Tensor, rows: int) -> Tensor:  # [count] -> [rows]
        """The values at their tokens' places; 0 elsewhere."""
        return values if self.index is None else values.new_zeros(rows).index_copy_(0, self.index, values)

    def slice(self, chunk: slice) -> Tensor | slice:
        """Which tokens a chunk of these rows holds."""
        return chunk if self.index is None else self.index[chunk]

    def unmasked(self) -> Tensor:  # [count]
        """Which of these are unmasked. Where masked tokens were left out all are, and kernels still get a mask: they
        are then the same kernels as where a CUDA graph is captured, which leaves none out."""
        return torch.ones(self.count, dtype=torch.bool, device=self.device) if self.mask is None else self.mask


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, so that nothing may be read back."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def row_chunks(begin: int, end: int, row_bytes: int, workspace_bytes: int, multiple: int = 1) -> Iterator[slice]:
    """Slices of about equal size from ``begin`` to ``end``, each at least one row and within the workspace.

    Args:
        begin, end: The rows.
        row_bytes: Of one row of the workspace.
        workspace_bytes: Of the workspace.
        multiple: Of which the slices' sizes are, the last one's excepted, where the workspace holds so many.
    """
    if begin >= end:
        return
    most = max(1, workspace_bytes // row_bytes)
    multiple = multiple if most >= multiple else 1
    most = most // multiple * multiple
    count = -(-(end - begin) // most)
    size = -(-(end - begin) // (count * multiple)) * multiple
    for start in range(begin, end, size):
        yield slice(start, min(start + size, end))


def pack_live(backend: str, values: Tensor, live: Tensor) -> tuple[Tensor, Tensor | None]:
    """The live rows of ``values [n, V]``, ``[m, V]`` in its memory, and which rows they were; None where all are kept.

    One sync, for their number. "cuda" moves no more rows than there are dead ones, in whatever order that makes;
    elsewhere the order is kept, and rows stay where moving them would cost more than their GEMMs.
    """
    if backend == "cuda":
        order, count = torch.ops.grpo_kernels.pack_rows_cuda(values, live)
        number = int(count)
        return values[:number], None if number == live.shape[0] else order[:number]
    index = live.nonzero()[:, 0]
    if index.shape[0] >= (1 - _WORTH_PACKING) * live.shape[0]:
        return values, None
    return pack_rows(values, index), index


def pack_rows(values: Tensor, index: Tensor) -> Tensor:  # [n, V], [m] -> [m, V]
    """Rows ``index`` of ``values``, rising, moved up against each other in their own memory, an eighth at a time."""
    count = index.shape[0]
    step = max(1, count // 8)
    for start in range(0, count, step):
        stop = min(start + step, count)
        values[start:stop] = values[index[start:stop]]  # read whole before any of it is written
    return values[:count]
