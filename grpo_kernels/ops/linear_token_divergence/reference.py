"""The rows that a policy's are compared with: logits as they are given, or projected chunk by chunk."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels.ops.linear_token_logprobs.head import Head
from grpo_kernels.ops.linear_token_logprobs.inputs import check_head, head_dtypes
from grpo_kernels.ops.linear_token_logprobs.reference import project
from grpo_kernels.ops.linear_token_logprobs.rows import Rows
from grpo_kernels.ops.validation import check_device, check_float, check_shape


class Reference(NamedTuple):
    """Logits, or hidden states and the head that makes logits of them, as they cross into registered ops."""

    logits: Tensor | None  # [N, V]
    hidden: Tensor | None  # [N, H'], H' its own
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
            ValueError: Not either logits or both of hidden states and head are given, or shapes or devices do not fit.
        """
        if logits is not None:
            for name, other in (("hidden_states", hidden), ("lm_head_weight", weight), ("bias", bias)):
                if other is not None:
                    raise ValueError(f"{prefix}{name} must be None beside {prefix}logits, got both")
            check_float(f"{prefix}logits", logits)
            check_shape(f"{prefix}logits", logits, (*ids.shape, vocab))
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

    @property
    def is_given(self) -> bool:
        """Whether there is one."""
        return self.logits is not None or self.hidden is not None

    def whole(self, mask: Tensor | None, logits_dtype: torch.dtype) -> Tensor:  # [N] -> [N, V]
        """All logits at once, for the "torch" backend."""
        if self.logits is not None:
            return self.logits.to(logits_dtype)
        return project(self.hidden, self.weight, self.bias, mask, self.compute_dtype, logits_dtype)  # type: ignore[arg-type]


#: ``Reference`` in the dispatcher's language, and how many arguments it is.
REFERENCE_SCHEMA = (
    "Tensor? reference_logits, Tensor? reference_hidden, Tensor? reference_weight, Tensor? reference_bias, "
    "ScalarType reference_dtype"
)
REFERENCE_COUNT = len(Reference._fields)
NO_REFERENCE = Reference(None, None, None, None, torch.float32)


class ReferenceRows:
    """A reference's logits, chunk by chunk.

    Args:
        reference: Where they come from.
        logits_dtype: What they are rounded to.
    """

    def __init__(self, reference: Reference, logits_dtype: torch.dtype) -> None:
        self.given = reference.logits
        self.hidden = reference.hidden
        self.logits_dtype = logits_dtype
        self.head = None
        if reference.weight is not None:
            self.head = Head(reference.weight, reference.bias, reference.compute_dtype, logits_dtype, logits_dtype)

    def workspace(self, rows: int) -> Tensor | None:
        """Memory for so many rows of logits, where they are projected."""
        return None if self.head is None else self.head.workspace(rows)

    def logits(self, rows: Rows, chunk: slice, workspace: Tensor | None) -> Tensor:  # -> [n, V]
        """The logits of a chunk of rows."""
        if self.head is None:
            return self.given[rows.part(chunk)].to(self.logits_dtype)
        return self.head.logits(self.head.inputs(self.hidden, rows, chunk), workspace)
