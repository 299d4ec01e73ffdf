"""How many rows of logits and of gradients a head holds at once, within a bound on its memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from grpo_kernels.ops.head.buffers import NeededGradients
from grpo_kernels.ops.head.gemm import Head
from grpo_kernels.ops.head.selection import row_chunks

#: Rows of a workspace beside a buffer: a GEMM of 512 rows is still bound by its arithmetic.
WORKSPACE_ROWS = 512
CPU_WORKSPACE_BYTES = 1 << 30
#: What the default lets a buffer take beyond the bytes of an fp32 ``dW``.
_BUFFER_BYTES = 1_000_000_000


@dataclass(frozen=True)
class RowBytes:
    """Bytes of what a head holds while it works.

    Args:
        logits: A row of the workspace, of the policy's logits and of a reference's.
        gradient: A row of the buffer; 0 if gradients are written over their logits.
        accumulator: The sums of ``dW`` over buffers; 0 if they are ``dW`` itself, or if it is not needed.
    """

    logits: int
    gradient: int
    accumulator: int

    @classmethod
    def of(cls, head: Head, needs: NeededGradients, reference_row: int = 0) -> RowBytes:
        return cls(
            head.row_bytes + reference_row,
            0 if head.is_in_place or not needs.any else head.gradient_row_bytes,
            head.accumulator_bytes if needs.need_dweight else 0,
        )

    def least(self, rows: int) -> int:
        """The least bound with which ``rows`` rows can be computed: one at a time, or all gradients in one buffer."""
        per_row = self.gradient or self.logits
        first = self.logits if self.gradient else 0
        return first + min(rows * per_row, per_row + self.accumulator)


@dataclass(frozen=True)
class MemoryPlan:
    """How a head's rows are divided.

    Args:
        chunk_rows: At most so many rows are projected at once.
        buffer_rows: At most so many rows of gradients are multiplied back at once.
        multiple: Numbers of rows are multiples of this where they can be.
        is_in_place: Whether gradients are written over their logits, so that a chunk is its own buffer.
    """

    chunk_rows: int
    buffer_rows: int
    multiple: int
    is_in_place: bool

    @classmethod
    def of(
        cls,
        head: Head,
        needs: NeededGradients,
        rows: int,
        live_rows: int,
        bound: int | None,
        reference_row: int = 0,
        includes_sums: bool = True,
        is_cut: bool = False,
    ) -> MemoryPlan:
        """The plan for ``rows`` rows, of which the first ``live_rows`` may have a gradient.

        Args:
            head: The projection.
            needs: Which gradients are needed.
            rows, live_rows: Numbers of rows.
            bound: Of workspace, buffer and accumulator together, in bytes. None means 1 GiB of workspace on a CPU;
                elsewhere a workspace of 512 rows and a buffer of ``min(s N V, 4 V H + 1e9)`` bytes, ``s`` the size of
                an element; and the accumulator.
            reference_row: Bytes of a row of a reference's logits.
            includes_sums: Whether the bound covers the accumulator.
            is_cut: Whether some rows with a gradient share no chunk with others: their logits were saved.

        Raises:
            ValueError: The bound is too small for one row.
        """
        sizes = RowBytes.of(head, needs, reference_row)
        live_rows = live_rows if needs.any else 0
        if bound is None:
            chunk, buffer = _default_rows(head, sizes, live_rows)
            return cls(chunk, buffer, head.row_multiple, head.is_in_place)
        reserved = sizes.accumulator if includes_sums else 0
        if head.is_in_place:
            chunk = buffer = _in_place_rows(sizes, live_rows, bound, reserved, is_cut)
        else:
            chunk, buffer = _rows_within(sizes, live_rows, bound, reserved)
        if rows and min(chunk, buffer if live_rows else 1) < 1:
            raise ValueError(f"workspace_bytes must be None or at least {sizes.least(rows)} here, got {bound}")
        return cls(max(chunk, 1), buffer, head.row_multiple, head.is_in_place)

    def blocks(self, rows: int, live_rows: int, segments: list[tuple[int, int]]) -> Iterator[list[slice]]:
        """The chunks whose gradients are multiplied back together; none crosses the end of a segment.

        Rows with a gradient are the first ``live_rows``. They share no chunk with the others unless one chunk holds
        all rows.
        """
        if self.is_in_place:
            ranges = [(0, rows)] if rows <= self.chunk_rows else [(0, live_rows), (live_rows, rows)]
            for begin, end in ranges:
                yield from ([chunk] for chunk in self._chunks(begin, end, segments))
            return
        buffers = row_chunks(0, live_rows, self.buffer_rows, self.multiple)
        for part in (*buffers, slice(live_rows, rows)):
            chunks = list(self._chunks(part.start, part.stop, segments))
            if chunks:
                yield chunks

    def _chunks(self, begin: int, end: int, segments: list[tuple[int, int]]) -> Iterator[slice]:
        for start, stop in segments:
            yield from row_chunks(max(begin, start), min(end, stop), self.chunk_rows, self.multiple)


def _default_rows(head: Head, sizes: RowBytes, live_rows: int) -> tuple[int, int]:
    """Rows of a chunk and of a buffer without a bound."""
    is_on_cpu = head.device.type == "cpu"
    if head.is_in_place and is_on_cpu:
        rows = max(1, CPU_WORKSPACE_BYTES // sizes.logits)
        return rows, rows
    row = sizes.gradient or sizes.logits
    buffer = min(live_rows, max(1, (head.dweight_bytes + _BUFFER_BYTES) // row))
    rows = max(buffer, WORKSPACE_ROWS)
    return (rows, rows) if head.is_in_place else (WORKSPACE_ROWS, buffer)


def _in_place_rows(sizes: RowBytes, live_rows: int, bound: int, reserved: int, is_cut: bool) -> int:
    """Rows of a chunk that is its own buffer; ``reserved`` bytes are the accumulator's unless one chunk is enough."""
    rows = bound // sizes.logits
    return rows if live_rows <= rows and not is_cut else (bound - reserved) // sizes.logits


def _rows_within(sizes: RowBytes, live_rows: int, bound: int, reserved: int) -> tuple[int, int]:
    """Rows of a chunk and of a buffer beside it: one buffer for all rows, without an accumulator, or several.

    Several have about three times the rows of a chunk, until that is the default's. A chunk reads ``2 V H`` bytes of
    the weight, and a buffer reads and writes ``8 V H`` bytes of sums; with logits of twice the size of gradients the
    sum of both is then the least. The cheaper of the two ways is taken.
    """
    chunk = min(WORKSPACE_ROWS, (bound - live_rows * sizes.gradient) // sizes.logits)
    if live_rows == 0:
        return chunk, 0
    room = bound - reserved
    chunk_of_several = min(WORKSPACE_ROWS, max(room // (sizes.logits + 3 * sizes.gradient), 1))
    buffer = (room - chunk_of_several * sizes.logits) // sizes.gradient
    if buffer < 1 or (chunk >= 1 and 2 / chunk <= 2 / chunk_of_several + 8 / buffer):
        return chunk, live_rows
    return chunk_of_several, buffer
