"""The one loop over chunks of tokens: projects a chunk, runs a row op on its logits, multiplies its gradient back.

Chunks are of tokens, not of the vocabulary, so one projection serves both a row's statistics and its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels.ops.head.buffers import HeadGradients, NeededGradients
from grpo_kernels.ops.head.gemm import Head
from grpo_kernels.ops.head.inputs import HeadOptions
from grpo_kernels.ops.head.memory import MemoryPlan
from grpo_kernels.ops.head.reference_model import ReferenceRows
from grpo_kernels.ops.head.selection import SelectedRows, pack_live, token_positions
from grpo_kernels.ops.head.sources import LogitsSource
from grpo_kernels.ops.registration import lazy_import


class Chunk(NamedTuple):
    """The input of a row op.

    Args:
        rows: Which of the selected rows.
        logits: ``[n, V]``.
        reference_logits: ``[n, V]``; None without a reference.
        dlogits: ``[n, V]``, where the op writes the gradient, over the logits if it has their dtype; None if it writes
            none.
    """

    rows: slice
    logits: Tensor
    reference_logits: Tensor | None
    dlogits: Tensor | None


class RowResults(NamedTuple):
    """The output of a row op.

    Args:
        values: Each ``[n]``.
        live: ``[n]``, which rows have a nonzero gradient; None if it does not pay to leave the others out.
    """

    values: tuple[Tensor, ...] = ()
    live: Tensor | None = None


RowOp = Callable[[Chunk], RowResults]


@dataclass(frozen=True)
class HeadPass:
    """One pass over the tokens of a head.

    Args:
        backend: The backend of the row kernels.
        head: The projection.
        hidden: Hidden states, ``[N, H]``, or those of ``[B, T + 1]`` positions: see ``token_positions``.
        rows: Which tokens are projected.
        needs: Which gradients are formed, from the rows that may have one.
        options: The bound of its memory.
        source: Where logits come from; None means the projection.
        reference: A reference's logits for the same rows.
        dhidden_dtype: As for ``HeadGradients``.
    """

    backend: str
    head: Head
    hidden: Tensor
    rows: SelectedRows
    needs: NeededGradients
    options: HeadOptions
    source: LogitsSource | None = None
    reference: ReferenceRows | None = None
    dhidden_dtype: torch.dtype | None = None

    def run(
        self, row_op: RowOp, dtypes: Sequence[torch.dtype], wanted: Sequence[bool] | None = None
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Runs the row op over all chunks, and multiplies the gradients back whenever their buffer is full.

        Args:
            row_op: What to do with a chunk.
            dtypes: The dtypes of its values.
            wanted: Which of its values are wanted; None means all.

        Returns:
            The values, each ``[N]``, 0 for tokens that were not projected, or ``[0]`` if not wanted; and ``dX``, ``dW``
            and ``db``, empty if not needed.
        """
        rows, source = self.rows, self.source or LogitsSource(self.head)
        positions = token_positions(self.hidden, rows.tokens)
        live_rows = rows.live_count if self.needs.any else 0
        segments = list(source.segments(rows.count))
        blocks = list(self._plan(segments, live_rows).blocks(rows.count, live_rows, segments))
        memory = _Memory.of(self.head, source, self.reference, blocks, live_rows)
        buffers = sum(block[0].start < live_rows for block in blocks)
        gradients = HeadGradients(self.head, self.hidden, self.needs, buffers, self.dhidden_dtype)
        parts: list[tuple[Tensor, ...]] = []
        for block in blocks:
            parts += self._run_block(block, live_rows, row_op, source, memory, gradients, positions)
        values = [torch.cat(pieces) if len(pieces) > 1 else pieces[0] for pieces in zip(*parts, strict=True)]
        values = values or [self.hidden.new_empty(0, dtype=dtype) for dtype in dtypes]
        wanted = [True] * len(dtypes) if wanted is None else wanted
        scattered = (rows.scatter(x) if is_wanted else x for x, is_wanted in zip(values, wanted, strict=True))
        return tuple(scattered), gradients.results()

    def _plan(self, segments: list[tuple[int, int]], live_rows: int) -> MemoryPlan:
        return MemoryPlan.of(
            self.head,
            self.needs,
            self.rows.count,
            live_rows,
            self.options.workspace_bytes,
            0 if self.reference is None else self.reference.row_bytes,
            self.options.bounds_sums,
            is_cut=sum(begin < min(end, live_rows) for begin, end in segments) > 1,
        )

    def _run_block(
        self,
        block: list[slice],
        live_rows: int,
        row_op: RowOp,
        source: LogitsSource,
        memory: _Memory,
        gradients: HeadGradients,
        positions: Tensor | None,
    ) -> list[tuple[Tensor, ...]]:
        """Runs the row op over chunks whose gradients share a buffer, and adds these gradients; returns its values."""
        start, stop = block[0].start, block[-1].stop
        inputs = self.head.inputs(self.hidden, self.rows, slice(start, stop), positions)
        buffer, values, live = memory.buffer, [], []
        for chunk in block:
            logits = source.logits(chunk, inputs[chunk.start - start : chunk.stop - start], memory.workspace)
            if self.head.is_in_place:  # the block's only chunk
                buffer = source.gradient_memory(logits, memory.workspace)
            reference_logits = None
            if self.reference is not None:
                reference_logits = self.reference.logits(chunk, memory.reference)
            for part, has_gradient in _split(chunk, live_rows):
                of_chunk = slice(part.start - chunk.start, part.stop - chunk.start)
                results = row_op(
                    Chunk(
                        part,
                        logits[of_chunk],
                        None if reference_logits is None else reference_logits[of_chunk],
                        buffer[part.start - start : part.stop - start] if has_gradient else None,
                    )
                )
                values.append(results.values)
                if has_gradient:
                    live.append(results.live)
        end = min(stop, live_rows)
        if end > start:
            flags = None if any(x is None for x in live) else torch.cat(live)
            scratch = None if self.head.is_in_place else memory.workspace
            part = slice(start, end)
            self._add_gradients(gradients, part, positions, buffer[: end - start], inputs, flags, scratch)
        return values

    def _add_gradients(
        self,
        gradients: HeadGradients,
        part: slice,
        positions: Tensor | None,
        dlogits: Tensor,
        inputs: Tensor,
        live: Tensor | None,
        scratch: Tensor | None,
    ) -> None:
        """Adds the gradients of a buffer, without its dead rows if they are known and many."""
        tokens, inputs = self.rows.slice(part), inputs[: dlogits.shape[0]]
        index = None
        if live is not None:
            dlogits, index = pack_live(self.backend, dlogits, live, scratch)
        if index is not None:
            inputs, tokens = inputs[index], index + tokens.start if isinstance(tokens, slice) else tokens[index]
        gradients.add(dlogits, inputs, tokens if positions is None else positions[tokens], scratch)


class _Memory(NamedTuple):
    """Memory of a pass, for its largest chunk and its largest buffer."""

    workspace: Tensor  # [chunk, row_width]
    reference: Tensor | None  # [chunk, row_width]
    buffer: Tensor | None  # [buffer, V]; None if gradients are written over the logits

    @classmethod
    def of(
        cls,
        head: Head,
        source: LogitsSource,
        reference: ReferenceRows | None,
        blocks: list[list[slice]],
        live_rows: int,
    ) -> _Memory:
        chunks = [chunk for block in blocks for chunk in block]
        buffer = None
        if not head.is_in_place:
            sizes = (block[-1].stop - block[0].start for block in blocks if block[0].start < live_rows)
            buffer = head.buffer(max(sizes, default=0))[:, : head.vocab]
        return cls(
            head.workspace(max((_size(chunk) for chunk in chunks if source.uses_workspace(chunk)), default=0)),
            None if reference is None else reference.workspace(max(map(_size, chunks), default=0)),
            buffer,
        )


def _split(chunk: slice, live_rows: int) -> Iterator[tuple[slice, bool]]:
    """The rows of a chunk that may have a gradient, then the others; empty parts are left out."""
    end = min(max(live_rows, chunk.start), chunk.stop)
    for part, has_gradient in ((slice(chunk.start, end), True), (slice(end, chunk.stop), False)):
        if part.start < part.stop:
            yield part, has_gradient


def _size(chunk: slice) -> int:
    return chunk.stop - chunk.start


_CLAMP_IDS = {
    "triton": lazy_import("grpo_kernels.ops.rows.triton.token_logprobs", "clamp_ids"),
    "cuda": lambda ids, mask, vocab: torch.ops.grpo_kernels.clamp_ids_cuda(ids, mask, vocab),
}


def clamp_ids(backend: str, ids: Tensor, mask: Tensor | None, vocab: int) -> Tensor:  # [N] -> [N]
    """The ids inside the vocabulary. On a GPU an unmasked id outside is flagged; C++ kernels refuse it themselves.

    It sees all tokens, so the flagged index is a token's; row kernels see only a chunk.
    """
    return _CLAMP_IDS[backend](ids, mask, vocab) if backend in _CLAMP_IDS else ids
