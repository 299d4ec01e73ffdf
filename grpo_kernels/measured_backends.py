"""What "auto" takes on an NVIDIA GPU where committed results show which backend is faster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class RowClass(NamedTuple):
    """What decides which backend is faster over rows of logits.

    Args:
        vocab: Elements of a row.
        is_aligned: Whether a row is a multiple of 16 bytes, one load of a thread, and so is the way to the next.
    """

    vocab: int
    is_aligned: bool

    @classmethod
    def of_logits(cls, logits: Tensor) -> RowClass:  # [..., N, V]
        """Of the rows of a tensor of logits."""
        lengths = (logits.shape[-1], logits.stride(-2))
        return cls(logits.shape[-1], all(length * logits.itemsize % 16 == 0 for length in lengths))

    @classmethod
    def of_head(cls, weight: Tensor) -> RowClass:  # [V, H]
        """Of the logits that a head makes, each row in memory of whole loads."""
        return cls(weight.shape[0], True)


@dataclass(frozen=True)
class Measured:
    """A backend that was the fastest for an op, on an architecture, over a class of rows.

    Args:
        op: Of ``grpo_kernels.backends.OPS``.
        architecture: Of the GPU, as 90 for 9.0.
        backend: The fastest one.
        results: The file that shows it, from the repository's root; a test compares the two.
        vocabularies: The least and the most elements of a row; None for an op without rows.
        is_aligned: As ``RowClass``; None for either.
    """

    op: str
    architecture: int
    backend: str
    results: str
    vocabularies: tuple[int, int] | None = None
    is_aligned: bool | None = None

    def covers(self, op: str, architecture: int, rows: RowClass | None) -> bool:
        """Whether it says anything of an op on a GPU over these rows."""
        if (self.op, self.architecture) != (op, architecture):
            return False
        if self.vocabularies is None:
            return True
        if rows is None or not self.vocabularies[0] <= rows.vocab <= self.vocabularies[1]:
            return False
        return self.is_aligned in (None, rows.is_aligned)


_H200 = "benchmarks/results/nvidia-h200/2026-11-27T230130-0.1.0.json"
#: Vocabularies near the one that was timed, 151936.
_LARGE = (120_000, 160_000)
#: The first that covers a call holds; where none does, "auto" goes by ``backends.PREFERENCE``: Triton. An entry comes
#: in the commit of the results that it names.
MEASURED: tuple[Measured, ...] = (
    Measured("grpo_loss", 90, "cuda", _H200, _LARGE, is_aligned=True),
    Measured("token_logprobs", 90, "cuda", _H200, _LARGE, is_aligned=True),
)
