"""Which tokens a head projects, in which order, and how many at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_kernels.device_values import flag_live_rows

#: The least share of dead rows at which a chunk is packed. Below it, moving rows costs more than their GEMMs.
_MIN_DEAD_SHARE = 1 / 8
_PACKING_BYTES = 1 << 24  # of rows that are moved at once without scratch memory, an eighth of them at most


@dataclass(frozen=True)
class SelectedRows:
    """Tokens in the order in which they are projected: those that may have a gradient, then the other unmasked ones.

    Args:
        index: The token of each row; None if all tokens are taken in their own order, masked ones included.
        live_count: How many rows may have a gradient; they come first.
        count: Number of rows.
        tokens: Number of tokens, those left out included.
        device: The device of the tokens.
        mask: The rows' mask if masked tokens are included.
    """

    index: Tensor | None  # [count]
    live_count: int
    count: int
    tokens: int
    device: torch.device
    mask: Tensor | None = None  # [count]

    @classmethod
    def of(cls, mask: Tensor | None, live: Tensor | None, like: Tensor, max_live: int | None = None) -> SelectedRows:
        """Selects among the rows of ``like [N, ...]``. One sync, or none during CUDA graph capture: all rows are taken.

        Args:
            mask: ``[N]`` bool; None if nothing is masked.
            live: ``[N]`` bool, which rows may have a gradient; None means all.
            like: Gives the number of rows and the device.
            max_live: Bound of the live rows. With it nothing is read back; masked rows are included, last.
        """
        rows = like.shape[0]
        if (mask is None and live is None) or (max_live is None and is_capturing(like.device)):
            return cls(None, rows, rows, rows, like.device, mask)
        # 2 live, 1 dead, 0 masked
        unmasked = torch.ones(rows, dtype=torch.bool, device=like.device) if mask is None else mask
        kind = unmasked.to(torch.uint8) + (unmasked if live is None else unmasked & live)
        if max_live is not None:
            flag_live_rows((kind == 2).sum(), max_live)
            order = kind.argsort(descending=True, stable=True)
            return cls(order, min(max_live, rows), rows, rows, like.device, unmasked[order])
        live_count, count = torch.stack([(kind == 2).sum(), (kind > 0).sum()]).tolist()
        if live_count == rows:
            return cls(None, rows, rows, rows, like.device)
        order = kind.argsort(descending=True, stable=True)[:count]
        return cls(order, live_count, count, rows, like.device)

    def gather(self, values: Tensor) -> Tensor:  # [N, ...] -> [count, ...]
        """The values of the selected tokens, in their order."""
        return values if self.index is None else values[self.index]

    def scatter(self, values: Tensor) -> Tensor:  # [count] -> [tokens]
        """The values at their tokens' positions; 0 elsewhere."""
        return values if self.index is None else values.new_zeros(self.tokens).index_copy_(0, self.index, values)

    def slice(self, chunk: slice) -> Tensor | slice:
        """The tokens of a chunk of these rows."""
        return chunk if self.index is None else self.index[chunk]

    def unmasked(self) -> Tensor:  # [count]
        """Which rows are unmasked. Never None, so that the same kernels run as during CUDA graph capture."""
        return torch.ones(self.count, dtype=torch.bool, device=self.device) if self.mask is None else self.mask


def token_positions(values: Tensor, tokens: int) -> Tensor | None:  # [R, ...] -> [tokens]
    """The row of ``values`` that predicts each token; None if they are the rows as they stand.

    More rows than tokens are those of completions ``[B, T + 1]``, whose last position predicts nothing.
    """
    extra = values.shape[0] - tokens
    if extra == 0:
        return None
    index = torch.arange(tokens, device=values.device)
    return index + index // max(tokens // extra, 1)


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured. Nothing may be read back then."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def row_chunks(begin: int, end: int, most: int, multiple: int = 1) -> Iterator[slice]:
    """Slices from ``begin`` to ``end`` of at most ``most`` rows each: as few as possible, of about equal size.

    All sizes but the last are a multiple of ``multiple`` where ``most`` allows that.
    """
    if begin >= end:
        return
    count = -(-(end - begin) // most)
    size = -(-(end - begin) // count)
    rounded = -(-size // multiple) * multiple
    size = rounded if rounded <= most else size
    for start in range(begin, end, size):
        yield slice(start, min(start + size, end))


def pack_live(
    backend: str, values: Tensor, live: Tensor, scratch: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Moves the live rows of ``values [n, V]`` together, in its own memory. One sync, for their number.

    Nothing is moved unless an eighth of the rows are dead: it would cost more than their GEMMs.

    Args:
        backend: "cuda" moves as few rows as possible and does not keep their order.
        values: The rows.
        live: Which of them are live, ``[n]``.
        scratch: Memory that may be overwritten, of any shape.

    Returns:
        The rows ``[m, V]``, and the index of each, ``[m]``; None if all rows are kept.
    """
    most = (1 - _MIN_DEAD_SHARE) * live.shape[0]
    if backend == "cuda":
        count = int(live.sum())
        if count > most:
            return values, None
        order, _ = torch.ops.grpo_kernels.pack_rows_cuda(values, live)
        return values[:count], order[:count]
    index = live.nonzero()[:, 0]
    return (values, None) if index.shape[0] > most else (pack_rows(values, index, scratch), index)


def pack_rows(values: Tensor, index: Tensor, scratch: Tensor | None = None) -> Tensor:  # [n, V], [m] -> [m, V]
    """Moves the rows ``index``, in rising order, to the front of ``values``, as many at a time as ``scratch`` holds."""
    count, vocab = index.shape[0], values.shape[1]
    if count == 0:
        return values[:0]
    row_bytes = vocab * values.itemsize
    held = 0 if scratch is None else scratch.numel() * scratch.itemsize // row_bytes
    if held:
        copies = scratch.view(-1).view(values.dtype)[: held * vocab].view(held, vocab)
    else:
        copies = values.new_empty(min(-(-count // 8), max(1, _PACKING_BYTES // row_bytes)), vocab)
    step = copies.shape[0]
    for start in range(0, count, step):
        stop = min(start + step, count)
        values[start:stop] = torch.index_select(values, 0, index[start:stop], out=copies[: stop - start])
    return values[:count]
