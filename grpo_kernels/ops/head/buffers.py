"""Memory of a head: gradients that chunks add up to, and logits that a forward keeps for its backward."""

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
class Needs(Call):
    """Which gradients of a head are needed."""

    need_dhidden: bool
    need_dweight: bool
    need_dbias: bool

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Needs:
        """Those that autograd will ask for; read before ``apply``, within which grad mode is off."""
        is_enabled = torch.is_grad_enabled()
        return cls(*(is_enabled and x is not None and x.requires_grad for x in (hidden, weight, bias)))

    @property
    def any(self) -> bool:
        return self.need_dhidden or self.need_dweight or self.need_dbias


class HeadGradients:
    """``dX``, and sums of ``dW`` and ``db`` over chunks; each only where it is needed.

    Sums are fp32 (fp64): the first chunk of ``dW`` is written, later ones are added. One chunk alone is written in the
    parameter's dtype where a GEMM does that.

    Args:
        head: The projection.
        hidden: The hidden states, ``[N, H]``; rows of ``dX`` that no chunk names stay 0.
        needs: Which are needed.
        chunks: How many are added, at most.
        dhidden_dtype: Of ``dX``; None means that of the hidden states.
    """

    def __init__(
        self, head: Head, hidden: Tensor, needs: Needs, chunks: int, dhidden_dtype: torch.dtype | None = None
    ) -> None:
        self.head = head
        self.dtype = accumulation_dtype(head.compute_dtype)
        dweight_dtype = head.gradient_dtype if chunks == 1 and head.writes_parameters else self.dtype
        self.dhidden = self.dweight = self.dbias = None
        if needs.need_dhidden:
            self.dhidden = hidden.new_zeros(hidden.shape, dtype=dhidden_dtype or hidden.dtype)
        if needs.need_dweight:
            self.dweight = hidden.new_empty((head.vocab, hidden.shape[1]), dtype=dweight_dtype)
        if needs.need_dbias:
            self.dbias = hidden.new_zeros(head.vocab, dtype=self.dtype)
        self._is_first = True

    def add(self, dlogits: Tensor, inputs: Tensor, rows: Tensor | slice) -> None:  # [n, V], [n, H]
        """Adds a chunk: the gradient of its logits, its ``Head.inputs``, and which rows of ``dX`` they are."""
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
    """Where a chunk's logits come from: projected, into the workspace."""

    def __init__(self, head: Head) -> None:
        self.head = head

    def segments(self, count: int) -> Iterator[tuple[int, int]]:
        """Ranges of rows that no chunk crosses."""
        yield 0, count

    def uses_workspace(self, chunk: slice) -> bool:
        """Whether the chunk's logits are written to the workspace."""
        return True

    def logits(self, chunk: slice, inputs: Tensor, workspace: Tensor) -> Tensor:  # [n, H] -> [n, V]
        return self.head.logits(inputs, workspace)


class KeepingLogits(LogitsSource):
    """Projects, and keeps the logits of the first rows for the backward.

    Args:
        head: The projection.
        ids: Token ids, ``[N]``.
        rows: What is projected.
        max_logits_bytes: As many rows are kept as fit.
    """

    def __init__(self, head: Head, ids: Tensor, rows: SelectedRows, max_logits_bytes: int) -> None:
        super().__init__(head)
        self.kept, _ = kept_shape(ids.shape[0], head.vocab, head.logits_dtype, head.device, max_logits_bytes)
        self.memory = head.workspace(self.kept)
        self.ids = ids.new_full((self.kept,), -1)  # which token each row of the memory is
        if self.kept:
            self.ids[: rows.count] = torch.arange(ids.shape[0], device=ids.device)[rows.slice(slice(0, self.kept))]

    def segments(self, count: int) -> Iterator[tuple[int, int]]:
        yield 0, min(self.kept, count)
        yield self.kept, count

    def uses_workspace(self, chunk: slice) -> bool:
        return chunk.start >= self.kept

    def logits(self, chunk: slice, inputs: Tensor, workspace: Tensor) -> Tensor:
        return self.head.logits(inputs, workspace if self.uses_workspace(chunk) else self.memory[chunk])


class KeptLogits(LogitsSource):
    """Takes the logits that a forward kept, and projects the others again. Kept rows come first, and rise.

    Args:
        head: The projection.
        memory: As ``KeepingLogits`` has it, ``[kept, row_width]``.
        ids: Which token each row of the memory is, ``[kept]``.
        rows: What is projected.
        count: How many tokens there are.
    """

    def __init__(self, head: Head, memory: Tensor, ids: Tensor, rows: SelectedRows, count: int) -> None:
        super().__init__(head)
        self.memory = memory
        self.places = None
        if ids.shape[0] and not is_capturing(ids.device):
            places = ids.new_full((count + 1,), -1)
            places[ids] = torch.arange(len(ids), device=ids.device)  # -1 is the place past the last
            self.places = rows.gather(places[:count])

    def logits(self, chunk: slice, inputs: Tensor, workspace: Tensor) -> Tensor:
        """Rows that lie together are read in place; else they are copied, and the others follow."""
        if self.places is None:
            return self.head.logits(inputs, workspace)
        places = self.places[chunk]
        reused, first, last = torch.stack([(places >= 0).sum(), places[0], places.max()]).tolist()
        if reused == places.shape[0] == last - first + 1:
            return self.memory[first : last + 1, : self.head.vocab]
        torch.index_select(self.memory, 0, places[:reused], out=workspace[:reused])
        if reused < places.shape[0]:
            self.head.logits(inputs[reused:], workspace[reused:])
        return workspace[: places.shape[0], : self.head.vocab]


def kept_shape(
    rows: int, vocab: int, dtype: torch.dtype, device: torch.device, max_logits_bytes: int
) -> tuple[int, int]:
    """Rows and width of the memory of ``KeepingLogits``."""
    width = row_width(vocab, dtype, device)
    return min(rows, max_logits_bytes // (width * dtype.itemsize)), width
