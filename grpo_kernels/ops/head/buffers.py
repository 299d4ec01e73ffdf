"""Which gradients of a head are needed, and their sums over buffers of gradient rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_kernels.calls import Call
from grpo_kernels.dtypes import accumulation_dtype
from grpo_kernels.ops.head.gemm import Head, matmul, project_back

_MIN_ROWS_AT_ONCE = 128  # scratch memory for fewer is not used: small GEMMs are slow


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
    """``dX``, and the sums of ``dW`` and ``db`` over buffers of gradient rows; each only if it is needed.

    At most one buffer: ``dW`` is written in the parameter's dtype, summed in fp32 (fp64) and rounded once. Several: the
    first one writes fp32 (fp64) sums, later ones add to them, and they are rounded at the end.

    Args:
        head: The projection.
        hidden: The hidden states, ``[N, H]``. Rows of ``dX`` that no buffer covers stay 0.
        needs: Which gradients are needed.
        buffers: The largest number of buffers that will be added.
        dhidden_dtype: The dtype of ``dX``; None means that of the hidden states.
    """

    def __init__(
        self, head: Head, hidden: Tensor, needs: NeededGradients, buffers: int, dhidden_dtype: torch.dtype | None = None
    ) -> None:
        self.head = head
        self.dtype = accumulation_dtype(head.compute_dtype)
        dweight_dtype = head.dweight_dtype if buffers <= 1 else self.dtype
        self.dhidden = self.dweight = self.dbias = None
        if needs.need_dhidden:
            self.dhidden = hidden.new_zeros(hidden.shape, dtype=dhidden_dtype or hidden.dtype)
        if needs.need_dweight:
            self.dweight = hidden.new_empty((head.vocab, hidden.shape[1]), dtype=dweight_dtype)
        if needs.need_dbias:
            self.dbias = hidden.new_zeros(head.vocab, dtype=self.dtype)
        self._is_first = True

    def add(self, dlogits: Tensor, inputs: Tensor, rows: Tensor | slice, scratch: Tensor | None = None) -> None:
        """Adds a buffer.

        Args:
            dlogits: The gradient of its logits, ``[n, V]``.
            inputs: Its ``Head.inputs``, ``[n, H]``.
            rows: Its rows of ``dX``.
            scratch: Memory that may be overwritten, of any shape: ``dX`` is summed there before it is rounded.
        """
        if dlogits.shape[0] == 0:
            return
        if self.dhidden is not None:
            self._add_dhidden(dlogits, rows, scratch)
        if self.dweight is not None:
            matmul(dlogits.t(), inputs, self.dweight, add=not self._is_first)
        if self.dbias is not None:
            self.dbias += dlogits.sum(0, dtype=self.dtype)
        self._is_first = False

    def _add_dhidden(self, dlogits: Tensor, rows: Tensor | slice, scratch: Tensor | None) -> None:
        count = dlogits.shape[0]
        held = count if scratch is None else scratch.numel() // self.dhidden.shape[1]
        if held < min(count, _MIN_ROWS_AT_ONCE):
            held, scratch = count, None
        for start in range(0, count, held):
            part = slice(start, min(start + held, count))
            sums = project_back(dlogits[part], self.head.weight, self.dtype, scratch)
            if isinstance(rows, slice):
                self.dhidden[rows][part] = sums
            else:
                self.dhidden.index_copy_(0, rows[part], sums.to(self.dhidden.dtype))

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
