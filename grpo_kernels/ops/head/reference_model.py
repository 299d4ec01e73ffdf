"""The logits of the reference model: either given, or projected chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_kernels.calls import Call
from grpo_kernels.ops.head.gemm import Head, row_width
from grpo_kernels.ops.head.inputs import check_head, head_dtypes
from grpo_kernels.ops.head.reference import project
from grpo_kernels.ops.head.selection import SelectedRows, token_positions
from grpo_kernels.validation import check_device, check_float, check_shape, position_shapes


@dataclass(frozen=True)
class Reference(Call):
    """A reference's logits, or its hidden states and head."""

    logits: Tensor | None  # [N, V], or [B (T + 1), V]: see ``token_positions``
    hidden: Tensor | None  # [N, H'], H' its own; or [B (T + 1), H']
    weight: Tensor | None  # [V, H']
    bias: Tensor | None  # [V]
    compute_dtype: torch.dtype

    @classmethod
    def of(
        cls,
        ids: Tensor,  # [B, T] or [N]
        vocab: int,
        logits: Tensor | None,
        hidden: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        prefix: str = "reference_",
    ) -> Reference:
        """Validates the arguments of a public function, whose names begin with ``prefix``.

        Raises:
            TypeError: A dtype does not fit.
            ValueError: Neither logits nor both hidden states and head are given, or logits and any of these, or shapes
                or devices do not fit.
        """
        if logits is not None:
            for name, other in (("hidden_states", hidden), ("lm_head_weight", weight), ("bias", bias)):
                if other is not None:
                    raise ValueError(f"{prefix}{name} must be None beside {prefix}logits, got both")
            check_float(f"{prefix}logits", logits)
            check_shape(f"{prefix}logits", logits, *position_shapes(ids, vocab))
            check_device(ids.device, [(f"{prefix}logits", logits)])
            return cls(logits.detach().reshape(-1, vocab), None, None, None, logits.dtype)
        if hidden is None or weight is None:
            raise ValueError(
                f"{prefix}logits, or both {prefix}hidden_states and {prefix}lm_head_weight, must be given, got "
                + ("neither" if hidden is None and weight is None else "one of the latter")
            )
        check_head(hidden, weight, bias, ids, prefix=prefix)
        check_shape(f"{prefix}lm_head_weight", weight, (vocab, weight.shape[1]))
        compute_dtype, _ = head_dtypes(hidden, weight, None, prefix=prefix)
        bias = None if bias is None else bias.detach()
        return cls(None, hidden.detach().reshape(-1, hidden.shape[-1]), weight.detach(), bias, compute_dtype)

    def all_logits(self, tokens: int, mask: Tensor | None, logits_dtype: torch.dtype) -> Tensor:  # -> [tokens, V]
        """All logits at once, for the "torch" backend."""
        values = self.hidden if self.logits is None else self.logits
        positions = token_positions(values, tokens)  # type: ignore[arg-type]
        values = values if positions is None else values[positions]  # type: ignore[index]
        if self.logits is not None:
            return values.to(logits_dtype)  # type: ignore[union-attr]
        return project(values, self.weight, self.bias, mask, self.compute_dtype, logits_dtype)  # type: ignore[arg-type]


class ReferenceRows:
    """A reference's logits, chunk by chunk: read in place, or written to a workspace of their own.

    Args:
        reference: Its logits, or hidden states and head.
        rows: The selected rows.
        logits_dtype: The dtype of the logits.
    """

    def __init__(self, reference: Reference, rows: SelectedRows, logits_dtype: torch.dtype) -> None:
        self.all_logits, self.hidden, self.rows, self.dtype = reference.logits, reference.hidden, rows, logits_dtype
        values = reference.hidden if reference.logits is None else reference.logits
        self.positions = token_positions(values, rows.tokens)  # type: ignore[arg-type]
        self.head = None
        if reference.weight is not None:
            self.head = Head(reference.weight, reference.bias, reference.compute_dtype, logits_dtype, logits_dtype)

    @property
    def is_read_in_place(self) -> bool:
        """Whether the given logits are used without a copy."""
        logits = self.all_logits
        is_dense = logits is not None and (logits.shape[1] == 1 or logits.stride(1) == 1)
        is_in_order = self.rows.index is None and self.positions is None
        return is_dense and is_in_order and logits.dtype == self.dtype

    @property
    def row_bytes(self) -> int:
        """Size of one row of the workspace."""
        return 0 if self.is_read_in_place else self._width * self.dtype.itemsize

    @property
    def _width(self) -> int:
        like = self.all_logits if self.head is None else self.head.parameter
        vocab = like.shape[1] if self.head is None else like.shape[0]
        return row_width(vocab, self.dtype, like.device)

    def workspace(self, rows: int) -> Tensor:  # [rows, row_width]
        """Memory for this many rows; empty if the logits are read in place."""
        like = self.all_logits if self.head is None else self.hidden
        return like.new_empty(0 if self.is_read_in_place else rows, self._width, dtype=self.dtype)

    def logits(self, chunk: slice, workspace: Tensor) -> Tensor:  # -> [n, V]
        """The logits of a chunk of rows."""
        if self.head is not None:
            return self.head.logits(self.head.inputs(self.hidden, self.rows, chunk, self.positions), workspace)
        if self.is_read_in_place:
            return self.all_logits[chunk]
        out = workspace[: chunk.stop - chunk.start, : self.all_logits.shape[1]]
        tokens = self.rows.slice(chunk)
        return out.copy_(self.all_logits[tokens if self.positions is None else self.positions[tokens]])
