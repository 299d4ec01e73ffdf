"""The one loop over chunks of tokens: each is projected, handed to a row op, and its gradient multiplied back.

Chunks are of tokens, not of the vocabulary, so that a row's statistics and its gradient need one projection together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels.ops.head.buffers import HeadGradients, LogitsSource, Needs
from grpo_kernels.ops.head.gemm import Head
from grpo_kernels.ops.head.reference_model import ReferenceRows
from grpo_kernels.ops.head.selection import SelectedRows, pack_live, row_chunks
from grpo_kernels.ops.registration import lazy_import


class Chunk(NamedTuple):
    """Rows that a row op is given.

    Args:
        rows: Which of the selected rows.
        logits: ``[n, V]``.
        reference_logits: ``[n, V]``, where a reference is projected beside the policy.
        dlogits: ``[n, V]``, where the gradient is to be written, which may lie over the logits; None where none is.
    """

    rows: slice
    logits: Tensor
    reference_logits: Tensor | None
    dlogits: Tensor | None


class RowResults(NamedTuple):
    """What a row op found.

    Args:
        values: Each ``[n]``.
        live: ``[n]``, which rows have a gradient that is not 0, where leaving the others out may be worth it.
    """

    values: tuple[Tensor, ...] = ()
    live: Tensor | None = None


RowOp = Callable[[Chunk], RowResults]


@dataclass(frozen=True)
class HeadPass:
    """One pass over the tokens of a head.

    Args:
        backend: Whose row kernels are used.
        head: The projection.
        hidden: Hidden states, ``[N, H]``.
        rows: Which tokens are projected.
        needs: Which gradients are needed: of the rows that may have one.
        workspace_bytes: Bound of the logits that exist at once.
        source: Where logits come from; None means the projection.
        reference: A reference's logits beside them.
        dhidden_dtype: As for ``HeadGradients``.
    """

    backend: str
    head: Head
    hidden: Tensor
    rows: SelectedRows
    needs: Needs
    workspace_bytes: int
    source: LogitsSource | None = None
    reference: ReferenceRows | None = None
    dhidden_dtype: torch.dtype | None = None

    def run(self, row_op: RowOp, dtypes: Sequence[torch.dtype | None]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Runs the row op over all chunks.

        Args:
            row_op: What is done with a chunk.
            dtypes: Of its values; None for one that is not wanted.

        Returns:
            The values, each ``[N]``, 0 where a token was not projected, or ``[0]`` where not wanted; and ``dX``, ``dW``
            and ``db``, empty where not needed.
        """
        head, rows, reference = self.head, self.rows, self.reference
        source = self.source or LogitsSource(head)
        chunks = list(self._chunks(source))
        gradients = HeadGradients(head, self.hidden, self.needs, len(chunks), self.dhidden_dtype)
        workspace = head.workspace(max((_size(chunk) for chunk in chunks if source.uses_workspace(chunk)), default=0))
        other_workspace = None if reference is None else reference.workspace(max(map(_size, chunks), default=0))
        values = [self.hidden.new_empty(0 if dtype is None else rows.count, dtype=dtype) for dtype in dtypes]
        for chunk in chunks:
            inputs = head.inputs(self.hidden, rows, chunk)
            logits = source.logits(chunk, inputs, workspace)
            others = None if reference is None else reference.logits(chunk, other_workspace)
            for part, has_gradient in self._parts(chunk):
                within = slice(part.start - chunk.start, part.stop - chunk.start)
                dlogits = head.gradient(workspace, within.stop)[within] if has_gradient else None
                found = row_op(Chunk(part, logits[within], None if others is None else others[within], dlogits))
                for whole, piece in zip(values, found.values, strict=True):
                    if whole.numel():
                        whole[part] = piece
                if dlogits is not None:
                    self._add(gradients, part, dlogits, inputs[within], found.live)
        count = self.hidden.shape[0]
        wanted = (x if dtype is None else rows.scatter(x, count) for x, dtype in zip(values, dtypes, strict=True))
        return tuple(wanted), gradients.results()

    def _chunks(self, source: LogitsSource) -> Iterator[slice]:
        row_bytes = self.head.row_bytes + (0 if self.reference is None else self.reference.row_bytes)
        for begin, end in source.segments(self.rows.count):
            yield from row_chunks(begin, end, row_bytes, self.workspace_bytes, self.head.multiple)

    def _parts(self, chunk: slice) -> Iterator[tuple[slice, bool]]:
        """The rows of a chunk that may have a gradient, and the others; not the empty ones."""
        live = self.rows.live if self.needs.any else 0
        end = min(max(live, chunk.start), chunk.stop)
        for part, has_gradient in ((slice(chunk.start, end), True), (slice(end, chunk.stop), False)):
            if part.start < part.stop:
                yield part, has_gradient

    def _add(self, gradients: HeadGradients, part: slice, dlogits: Tensor, inputs: Tensor, live: Tensor | None) -> None:
        """Adds a chunk's gradient, without its dead rows where they are known."""
        which = self.rows.slice(part)
        index = None
        if live is not None:
            dlogits, index = pack_live(self.backend, dlogits, live)
        if index is not None:
            inputs, which = inputs[index], index + which.start if isinstance(which, slice) else which[index]
        gradients.add(dlogits, inputs, which)


def _size(chunk: slice) -> int:
    return chunk.stop - chunk.start


_CLAMP_IDS = {
    "triton": lazy_import("grpo_kernels.ops.rows.triton.token_logprobs", "hold_ids"),
    "cuda": lambda ids, mask, vocab: torch.ops.grpo_kernels.hold_ids_cuda(ids, mask, vocab),
}


def clamp_ids(backend: str, ids: Tensor, mask: Tensor | None, vocab: int) -> Tensor:  # [N] -> [N]
    """The ids as row kernels take them that see a chunk's: C++ refuses a bad one, a GPU clamps and flags it."""
    return _CLAMP_IDS[backend](ids, mask, vocab) if backend in _CLAMP_IDS else ids
