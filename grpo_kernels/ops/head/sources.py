"""Where the logits of a chunk come from: the projection, or logits saved from the forward for the backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from grpo_kernels.ops.head.gemm import Head, row_width
from grpo_kernels.ops.head.selection import SelectedRows, is_capturing, pack_rows


class LogitsSource:
    """Provides the logits of a chunk. This one projects them into the workspace."""

    def __init__(self, head: Head) -> None:
        self.head = head

    def segments(self, count: int) -> Iterator[tuple[int, int]]:
        """Ranges of rows; no chunk may cross from one into the next."""
        yield 0, count

    def uses_workspace(self, chunk: slice) -> bool:
        """Whether the chunk's logits are written to the workspace."""
        return True

    def logits(self, chunk: slice, inputs: Tensor, workspace: Tensor) -> Tensor:  # [n, H] -> [n, V]
        return self.head.logits(inputs, workspace)

    def gradient_memory(self, logits: Tensor, workspace: Tensor) -> Tensor:  # [n, V] -> [n, V]
        """Where the gradient of a chunk is written if it has the dtype of the logits: over them."""
        return logits


class SavingLogitsSource(LogitsSource):
    """Projects, and saves the logits of the first rows for the backward.

    Args:
        head: The projection.
        ids: Token ids, ``[N]``.
        rows: The rows to project.
        max_logits_bytes: As many rows are saved as fit into this.
    """

    def __init__(self, head: Head, ids: Tensor, rows: SelectedRows, max_logits_bytes: int) -> None:
        super().__init__(head)
        shape = saved_logits_shape(ids.shape[0], head.vocab, head.logits_dtype, head.device, max_logits_bytes)
        self.saved_count = shape[0]
        self.saved_logits = head.workspace(self.saved_count)
        self.saved_ids = ids.new_full((self.saved_count,), -1)  # the token of each saved row
        if self.saved_count:
            tokens = torch.arange(ids.shape[0], device=ids.device)[rows.slice(slice(0, self.saved_count))]
            self.saved_ids[: rows.count] = tokens

    def segments(self, count: int) -> Iterator[tuple[int, int]]:
        yield 0, min(self.saved_count, count)
        yield self.saved_count, count

    def uses_workspace(self, chunk: slice) -> bool:
        return chunk.start >= self.saved_count

    def logits(self, chunk: slice, inputs: Tensor, workspace: Tensor) -> Tensor:
        return self.head.logits(inputs, workspace if self.uses_workspace(chunk) else self.saved_logits[chunk])


class SavedLogitsSource(LogitsSource):
    """Reads the logits that a forward saved, and projects all others again. Saved rows come first, in rising order.

    Args:
        head: The projection.
        saved_logits: Those of ``SavingLogitsSource``, ``[saved, row_width]``.
        saved_ids: The token of each saved row, ``[saved]``.
        rows: The rows to project.
        count: Number of tokens.
        may_overwrite: Whether the saved logits are not needed afterwards. Then they are packed where they lie, and
            their gradient is written over them. Otherwise it takes a workspace, and so do rows that are not contiguous.
    """

    def __init__(
        self,
        head: Head,
        saved_logits: Tensor,
        saved_ids: Tensor,
        rows: SelectedRows,
        count: int,
        may_overwrite: bool,
    ) -> None:
        super().__init__(head)
        self.may_overwrite = may_overwrite
        self.saved_logits = saved_logits
        self.reused, self.first = 0, 0  # how many of the selected rows were saved; the position of the first
        self.positions = None  # of the reused rows among the saved ones, if they are not contiguous
        if saved_ids.shape[0] and rows.count and not is_capturing(saved_ids.device):
            positions = saved_ids.new_full((count + 1,), -1)
            positions[saved_ids] = torch.arange(len(saved_ids), device=saved_ids.device)  # -1 indexes the extra element
            self._choose(rows.gather(positions[:count]))

    def _choose(self, positions: Tensor) -> None:  # [rows.count], -1 for rows that were not saved
        self.reused, first, last = torch.stack([(positions >= 0).sum(), positions[0], positions.max()]).tolist()
        if self.reused == last - first + 1:
            self.first = first
        elif self.may_overwrite:
            pack_rows(self.saved_logits, positions[: self.reused])
        else:
            self.positions = positions[: self.reused]

    def segments(self, count: int) -> Iterator[tuple[int, int]]:
        yield 0, self.reused
        yield self.reused, count

    def uses_workspace(self, chunk: slice) -> bool:
        return chunk.start >= self.reused or not self.may_overwrite

    def logits(self, chunk: slice, inputs: Tensor, workspace: Tensor) -> Tensor:
        if chunk.start >= self.reused:
            return self.head.logits(inputs, workspace)
        if self.positions is None:
            return self.saved_logits[self.first + chunk.start : self.first + chunk.stop, : self.head.vocab]
        out = workspace[: chunk.stop - chunk.start]
        return torch.index_select(self.saved_logits, 0, self.positions[chunk], out=out)[:, : self.head.vocab]

    def gradient_memory(self, logits: Tensor, workspace: Tensor) -> Tensor:
        return logits if self.may_overwrite else workspace[: logits.shape[0], : self.head.vocab]


def saved_logits_shape(
    rows: int, vocab: int, dtype: torch.dtype, device: torch.device, max_logits_bytes: int
) -> tuple[int, int]:
    """Rows and width of the logits that ``SavingLogitsSource`` saves."""
    width = row_width(vocab, dtype, device)
    return min(rows, max_logits_bytes // (width * dtype.itemsize)), width
