"""The head's GEMMs in chunks of tokens, through one reused workspace of logits.

Chunks of tokens, not of the vocabulary, so that a row's statistics and its gradient need one GEMM together. Gradients
accumulate in fp32 (fp64): the first chunk of ``dW`` is written, later ones are added.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from grpo_kernels.ops.token_logprobs.op import accumulation_dtype

#: Bytes of logits that exist at once, unless the caller gives another bound.
DEFAULT_WORKSPACE_BYTES = 1 << 30


def row_chunks(rows: int, vocab: int, element_size: int, workspace_bytes: int) -> Iterator[slice]:
    """Slices of about equal size that cover ``rows``, each at least one row and within the workspace."""
    most = max(1, workspace_bytes // (vocab * element_size))
    count = max(1, -(-rows // most))
    size = -(-rows // count) if rows else 0
    for start in range(0, rows, max(size, 1)):
        yield slice(start, min(start + size, rows))


class Head:
    """A projection ``h W^T + b`` as GEMMs that write where they are told.

    On a CPU no GEMM writes fp32 from half-precision inputs, so for fp32 logits the rounded inputs are widened first,
    once a call: exact, and faster than the half-precision GEMM where the processor has none.

    Args:
        weight: ``[V, H]``.
        bias: ``[V]`` or None.
        compute_dtype: What hidden states, weight and bias are rounded to.
        logits_dtype: What the logits, and their gradient, are rounded to.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, compute_dtype: torch.dtype, logits_dtype: torch.dtype
    ) -> None:
        self.compute_dtype = compute_dtype
        self.logits_dtype = logits_dtype
        self.parameter_dtypes = (weight.dtype, weight.dtype if bias is None else bias.dtype)
        self.parameter = weight
        self.bias = None if bias is None else self.cast(bias)

    @cached_property
    def weight(self) -> Tensor:
        """The weight as the GEMMs take it: only made when a row needs it."""
        return self.cast(self.parameter)

    @property
    def vocab(self) -> int:
        return self.parameter.shape[0]

    def cast(self, values: Tensor) -> Tensor:
        """``values`` as the GEMMs take them."""
        return values.detach().to(self.compute_dtype).to(self.logits_dtype)

    def workspace(self, rows: int) -> Tensor:  # [rows, V]
        return torch.empty(rows, self.vocab, dtype=self.logits_dtype, device=self.parameter.device)

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:  # [n, H], [n, V] -> [n, V]
        """The logits of rows of ``cast`` hidden states."""
        if self.bias is None:
            return torch.mm(hidden, self.weight.t(), out=out)
        return torch.addmm(self.bias, hidden, self.weight.t(), out=out)


class HeadGradients:
    """Sums of ``dX``, ``dW`` and ``db`` over chunks; each only where it is needed.

    Args:
        head: The projection.
        hidden: The hidden states, ``[N, H]``; rows of ``dX`` that no chunk names stay 0.
        needs: Whether ``dX``, ``dW`` and ``db`` are needed.
    """

    def __init__(self, head: Head, hidden: Tensor, needs: tuple[bool, bool, bool]) -> None:
        self.head = head
        self.dtypes = (hidden.dtype, *head.parameter_dtypes)
        dtype = accumulation_dtype(head.compute_dtype)
        self.dhidden = hidden.new_zeros(hidden.shape, dtype=dtype) if needs[0] else None
        self.dweight = hidden.new_empty((head.vocab, hidden.shape[1]), dtype=dtype) if needs[1] else None
        self.dbias = hidden.new_zeros(head.vocab, dtype=dtype) if needs[2] else None
        self._is_first = True

    def add(self, dlogits: Tensor, hidden: Tensor, rows: Tensor | slice) -> None:  # [n, V], [n, H]
        """Adds a chunk: the gradient of its logits, the ``cast`` hidden states, and which rows of ``dX`` they are."""
        if dlogits.shape[0] == 0:
            return
        if self.dhidden is not None:
            self.dhidden[rows] = _mm(dlogits, self.head.weight).to(self.dhidden.dtype)
        if self.dweight is not None:
            self._add_weight(self.dweight, dlogits, hidden)
        if self.dbias is not None:
            self.dbias += dlogits.sum(0, dtype=self.dbias.dtype)
        self._is_first = False

    def _add_weight(self, dweight: Tensor, dlogits: Tensor, hidden: Tensor) -> None:
        if dlogits.dtype != dweight.dtype:  # half precision: no GEMM here writes fp32 from it
            dlogits, hidden = dlogits.to(dweight.dtype), hidden.to(dweight.dtype)
        if self._is_first:
            torch.mm(dlogits.t(), hidden, out=dweight)
        else:
            dweight.addmm_(dlogits.t(), hidden)

    def results(self) -> tuple[Tensor, ...]:
        """``dX``, ``dW`` and ``db`` in their parameters' dtypes; empty where not needed."""
        if self._is_first and self.dweight is not None:
            self.dweight.zero_()
        grads = (self.dhidden, self.dweight, self.dbias)
        return tuple(
            self.head.parameter.new_empty(0, dtype=dtype) if grad is None else grad.to(dtype)
            for grad, dtype in zip(grads, self.dtypes, strict=True)
        )


def _mm(dlogits: Tensor, weight: Tensor) -> Tensor:  # [n, V], [V, H] -> [n, H]
    """A GEMM even for few rows: the kernels that libraries keep for fewer than four sum the vocabulary in sequence.

    That is 80 times the error over 129280 columns: seen for one row on Intel, for up to three on AMD.
    """
    missing = 4 - dlogits.shape[0]
    if missing <= 0:
        return dlogits @ weight
    return (torch.nn.functional.pad(dlogits, (0, 0, 0, missing)) @ weight)[:-missing]


def unmasked_rows(mask: Tensor | None, rows: int) -> Tensor | slice:
    """The rows that are not masked: all of them as a slice where nothing is masked."""
    if mask is None:
        return slice(0, rows)
    index = mask.reshape(-1).nonzero()[:, 0]
    return slice(0, rows) if index.shape[0] == rows else index


def count_rows(rows: Tensor | slice) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else rows.shape[0]


def part(rows: Tensor | slice, chunk: slice) -> Tensor | slice:
    """The chunk's part of the rows."""
    return chunk if isinstance(rows, slice) else rows[chunk]
