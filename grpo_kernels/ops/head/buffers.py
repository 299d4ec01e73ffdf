"""Memory of a head: gradients summed over chunks, and logits saved from the forward for the backward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_kernels.calls import Call
from grpo_kernels.dtypes import accumulation_dtype
from grpo_kernels.ops.head.gemm import Head, matmul, project_back, row_width
from grpo_kernels.ops.head.selection import SelectedRows, is_capturing


@dataclass(frozen=True)
class NeededGradients(Call):
    """Which gradients of a head are needed."""

    need_dhidden: bool
    need_dweight: bool
    need_dbias: bool

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> NeededGradients:
        """The gradients that autograd will need. Call it before ``apply``, which switches grad mode off."""
        is_enabled = torch.is_grad_enabled()
        return cls(*(is_enabled and x is not None and x.requires_grad for x in (hidden, weight, bias)))

    @property
    def any(self) -> bool:
        return self.need_dhidden or self.need_dweight or self.need_dbias


class HeadGradients:
    """``dX``, and the sums of ``dW`` and ``db`` over chunks; each only if it is needed.

    Sums are fp32 (fp64): the first chunk writes ``dW``, later chunks add to it. If there is only one chunk, ``dW`` is
    written in the parameter's dtype, provided that a GEMM can do that.

    Args:
        head: The projection.
        hidden: The hidden states, ``[N, H]``. Rows of ``dX`` that no chunk covers stay 0.
        needs: Which gradients are needed.
        chunks: The largest number of chunks that will be added.
        dhidden_dtype: The dtype of ``dX``; None means that of the hidden states.
    """

    def __init__(
        self, head: Head, hidden: Tensor, needs: NeededGradients, chunks: int, dhidden_dtype: torch.dtype | None = None
    ) -> None:
        self.head = head
        self.dtype = accumulation_dtype(head.compute_dtype)
        dweight_dtype = head.gradient_dtype if chunks == 1 and head.writes_dweight else self.dtype
        self.dhidden = self.dweight = self.dbias = None
        if needs.need_dhidden:
            self.dhidden = hidden.new_zeros(hidden.shape, dtype=dhidden_dtype or hidden.dtype)
        if needs.need_dweight:
            self.dweight = hidden.new_empty((head.vocab, hidden.shape[1]), dtype=dweight_dtype)
        if needs.need_dbias:
            self.dbias = hidden.new_zeros(head.vocab, dtype=self.dtype)
        self._is_first = True

    def add(self, dlogits: Tensor, inputs: Tensor, rows: Tensor | slice) -> None:  # [n, V], [n, H]
        """Adds a chunk.

        Args:
            dlogits: The gradient of its logits.
            inputs: Its ``Head.inputs``.
            rows: Its rows of ``dX``.
        """
        if dlogits.shape[0] == 0:
            return
        if self.dhidden is not None:
            self.dhidden[rows] = project_back(dlogits, self.head.weight, self.dtype).to(self.dhidden.dtype)
        if self.dweight is not None:
            matmul(dlogits.t(), inputs, self.dweight, add=not self._is_first)
        if self.dbias is not None:
            self.dbias += dlogits.sum(0, dtype=self.dtype)
        self._is_first = False

    def results(self) -> tuple[Tensor, ...]:
        """``dX``, ``dW`` and ``db`` in their parameters' dtypes; empty where not needed."""
        if self._is_first and self.dweight is not None:
            self.dweight.zero_()
        like = self.head.parameter
        hidden_dtype = like.dtype if self.dhidden is None else self.dhidden.dtype
        grads = (self.dhidden, self.dweight, self.dbias)
        return tuple(
            like.new_empty(0, dtype=dtype) if grad is None else grad.to(dtype)
            for grad, dtype in zip(grads, (hidden_dtype, *self.head.parameter_dtypes), strict=True)
        )


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
    """

    def __init__(self, head: Head, saved_logits: Tensor, saved_ids: Tensor, rows: SelectedRows, count: int) -> None:
        super().__init__(head)
        self.saved_logits = saved_logits
        self.positions = None  # of each selected row among the saved ones, -1 if it was not saved
        if saved_ids.shape[0] and not is_capturing(saved_ids.device):
            positions = saved_ids.new_full((count + 1,), -1)
            positions[saved_ids] = torch.arange(len(saved_ids), device=saved_ids.device)  # -1 indexes the extra element
            self.positions = rows.gather(positions[:count])

    def logits(self, chunk: slice, inputs: Tensor, workspace: Tensor) -> Tensor:
        """Reads saved rows in place if they are contiguous. Otherwise copies them, and projects the rest after them."""
        if self.positions is None:
            return self.head.logits(inputs, workspace)
        positions = self.positions[chunk]
        reused, first, last = torch.stack([(positions >= 0).sum(), positions[0], positions.max()]).tolist()
        if reused == positions.shape[0] == last - first + 1:
            return self.saved_logits[first : last + 1, : self.head.vocab]
        torch.index_select(self.saved_logits, 0, positions[:reused], out=workspace[:reused])
        if reused < positions.shape[0]:
            self.head.logits(inputs[reused:], workspace[reused:])
        return workspace[: positions.shape[0], : self.head.vocab]


def saved_logits_shape(
    rows: int, vocab: int, dtype: torch.dtype, device: torch.device, max_logits_bytes: int
) -> tuple[int, int]:
    """Rows and width of the logits that ``SavingLogitsSource`` saves."""
    width = row_width(vocab, dtype, device)
    return min(rows, max_logits_bytes // (width * dtype.itemsize)), width
