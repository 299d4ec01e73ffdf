"""The one loop over chunks of tokens: projects a chunk, runs a row op on its logits, multiplies its gradient back.

Chunks are of tokens, not of the vocabulary, so one projection serves both a row's statistics and its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels.ops.head.buffers import HeadGradients, LogitsSource, NeededGradients
from grpo_kernels.ops.head.gemm import Head
from grpo_kernels.ops.head.reference_model import ReferenceRows
from grpo_kernels.ops.head.selection import SelectedRows, pack_live, row_chunks
from grpo_kernels.ops.registration import lazy_import


class Chunk(NamedTuple):
    """The input of a row op.

    Args:
        rows: Which of the selected rows.
        logits: ``[n, V]``.
        reference_logits: ``[n, V]``; None without a reference.
        dlogits: ``[n, V]``, where the op writes the gradient, possibly over the logits; None if it writes none.
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
        hidden: Hidden states, ``[N, H]``.
        rows: Which tokens are projected.
        needs: Which gradients are formed, from the rows that may have one.
        workspace_bytes: Bound of the logits that exist at once.
        source: Where logits come from; None means the projection.
        reference: A reference's logits for the same rows.
        dhidden_dtype: As for ``HeadGradients``.
    """

    backend: str
    head: Head
    hidden: Tensor
    rows: SelectedRows
    needs: NeededGradients
    workspace_bytes: int
    source: LogitsSource | None = None
    reference: ReferenceRows | None = None
    dhidden_dtype: torch.dtype | None = None

    def run(
        self, row_op: RowOp, dtypes: Sequence[torch.dtype], wanted: Sequence[bool] | None = None
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Runs the row op over all chunks.

        Args:
            row_op: What to do with a chunk.
            dtypes: The dtypes of its values.
            wanted: Which of its values are wanted; None means all.

        Returns:
            The values, each ``[N]``, 0 for tokens that were not projected, or ``[0]`` if not wanted; and ``dX``, ``dW``
            and ``db``, empty if not needed.
        """
        head, rows, reference = self.head, self.rows, self.reference
        source = self.source or LogitsSource(head)
        chunks = list(self._chunks(source))
        gradients = HeadGradients(head, self.hidden, self.needs, len(chunks), self.dhidden_dtype)
        workspace = head.workspace(max((_size(chunk) for chunk in chunks if source.uses_workspace(chunk)), default=0))
        reference_workspace = None if reference is None else reference.workspace(max(map(_size, chunks), default=0))
        wanted = [True] * len(dtypes) if wanted is None else wanted
        parts = []
        for chunk in chunks:
            inputs = head.inputs(self.hidden, rows, chunk)
            logits = source.logits(chunk, inputs, workspace)
            reference_logits = None if reference is None else reference.logits(chunk, reference_workspace)
            for part, has_gradient in self._split_by_gradient(chunk):
                within = slice(part.start - chunk.start, part.stop - chunk.start)
                dlogits = head.gradient(workspace, within.stop) if has_gradient else None
                part_logits, part_reference, part_inputs, dlogits = (
                    x if x is None or within == slice(0, x.shape[0]) else x[within]
                    for x in (logits, reference_logits, inputs, dlogits)
                )
                results = row_op(Chunk(part, part_logits, part_reference, dlogits))
                parts.append(results.values)
                if dlogits is not None:
                    self._add_gradient(gradients, part, dlogits, part_inputs, results.live)
        values = [torch.cat(pieces) if len(pieces) > 1 else pieces[0] for pieces in zip(*parts, strict=True)]
        values = values or [self.hidden.new_empty(0, dtype=dtype) for dtype in dtypes]
        count = self.hidden.shape[0]
        scattered = (rows.scatter(x, count) if is_wanted else x for x, is_wanted in zip(values, wanted, strict=True))
        return tuple(scattered), gradients.results()

    def _chunks(self, source: LogitsSource) -> Iterator[slice]:
        row_bytes = self.head.row_bytes + (0 if self.reference is None else self.reference.row_bytes)
        for begin, end in source.segments(self.rows.count):
            yield from row_chunks(begin, end, row_bytes, self.workspace_bytes, self.head.row_multiple)

    def _split_by_gradient(self, chunk: slice) -> Iterator[tuple[slice, bool]]:
        """The rows of a chunk that may have a gradient, then the others; empty parts are left out."""
        live_count = self.rows.live_count if self.needs.any else 0
        end = min(max(live_count, chunk.start), chunk.stop)
        for part, has_gradient in ((slice(chunk.start, end), True), (slice(end, chunk.stop), False)):
            if part.start < part.stop:
                yield part, has_gradient

    def _add_gradient(
        self, gradients: HeadGradients, part: slice, dlogits: Tensor, inputs: Tensor, live: Tensor | None
    ) -> None:
        """Adds the gradient of a chunk, without its dead rows if they are known."""
        tokens = self.rows.slice(part)
        index = None
        if live is not None:
            dlogits, index = pack_live(self.backend, dlogits, live)
        if index is not None:
            inputs, tokens = inputs[index], index + tokens.start if isinstance(tokens, slice) else tokens[index]
        gradients.add(dlogits, inputs, tokens)


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
