"""The backends that "auto" takes on an NVIDIA GPU because committed results show them to be faster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class RowClass(NamedTuple):
    """The properties of rows of logits on which the fastest backend depends.

    Args:
        vocab: Elements of a row.
        is_aligned: Whether a row, and the stride to the next, is a multiple of 16 bytes, one load of a thread.
    """

    vocab: int
    is_aligned: bool

    @classmethod
    def of_logits(cls, logits: Tensor) -> RowClass:  # [..., N, V]
        """The class of the rows of these logits."""
        lengths = (logits.shape[-1], logits.stride(-2))
        return cls(logits.shape[-1], all(length * logits.itemsize % 16 == 0 for length in lengths))

    @classmethod
    def of_head(cls, weight: Tensor) -> RowClass:  # [V, H]
        """The class of the logits of a head. Their workspace is always aligned."""
        return cls(weight.shape[0], True)


@dataclass(frozen=True)
class Measured:
    """The backend that was measured to be the fastest for an op, on an architecture, for a class of rows.

    Args:
        op: One of ``grpo_kernels.backends.OPS``.
        architecture: The GPU's, as 90 for 9.0.
        backend: The fastest one.
        results: The file that shows it, from the repository's root; a test compares the two.
        vocabularies: The smallest and the largest vocabulary; None for an op without rows of logits.
        is_aligned: As in ``RowClass``; None means either.
    """

    op: str
    architecture: int
    backend: str
    results: str
    vocabularies: tuple[int, int] | None = None
    is_aligned: bool | None = None

    def covers(self, op: str, architecture: int, rows: RowClass | None) -> bool:
        """Whether this applies to an op on an architecture with these rows."""
        if (self.op, self.architecture) != (op, architecture):
            return False
        if self.vocabularies is None:
            return True
        if rows is None or not self.vocabularies[0] <= rows.vocab <= self.vocabularies[1]:
            return False
        return self.is_aligned in (None, rows.is_aligned)


_H200 = "benchmarks/results/nvidia-h200/2026-11-27T230130-0.1.0.json"
#: Vocabularies near the measured one, 151936.
_LARGE = (120_000, 160_000)
#: The first entry that covers a call applies. Without one, "auto" follows ``backends.PREFERENCE``, which is Triton. An
#: entry is added in the commit of the results that it names.
MEASURED: tuple[Measured, ...] = (
    Measured("grpo_loss", 90, "cuda", _H200, _LARGE, is_aligned=True),
    Measured("token_logprobs", 90, "cuda", _H200, _LARGE, is_aligned=True),
)
