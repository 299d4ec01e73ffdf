"""Which of our backends a result shows to be faster, by op and rows: what ``measured_backends.MEASURED`` rests on."""

from __future__ import annotations

from typing import NamedTuple

from records import Results, Row

from grpo_kernels.measured_backends import Measured

_EQUAL = 1.03  # ratios nearer to 1 are noise
_CUDA, _TRITON = ", CUDA", ", Triton"
#: By the name of a work: the op that its provider of ours is, and whether the head pads its rows.
_OPS = {
    "logits": ("grpo_loss", False),
    "hidden": ("linear_grpo_loss", True),
    "frozen": ("linear_grpo_loss", True),
    "logprobs": ("linear_token_logprobs", True),
    "upstream": ("linear_token_logprobs", True),
    "policy": ("policy_loss", False),
}


class Evidence(NamedTuple):
    """One comparison of the two backends.

    Args:
        op: Of ``grpo_kernels.backends.OPS``.
        vocab: Elements of a row; 0 for an op without rows.
        is_aligned: Whether rows are multiples of 16 bytes.
        title: The work.
        ratio: CUDA's time over Triton's.
    """

    op: str
    vocab: int
    is_aligned: bool
    title: str
    ratio: float


def evidence(results: Results) -> list[Evidence]:
    """A line for each work that both backends were timed at, in the same setting."""
    times = {(row.title, row.provider): row for row in results.rows if row.status == "ok"}
    found = []
    for (title, provider), row in times.items():
        other = times.get((title, provider.replace(_CUDA, _TRITON)))
        op = _op_of(row)
        if _CUDA in provider and other is not None and op is not None:
            name, is_padded = op
            vocab = row.shape.get("V", 0)
            is_aligned = is_padded or vocab * (2 if row.dtype in ("bfloat16", "float16") else 4) % 16 == 0
            found.append(Evidence(name, vocab, is_aligned, title, row.median_ms / other.median_ms))
    return found


def contradictions(measured: Measured, results: Results) -> list[str]:
    """Why an entry is not what its results show: another backend is faster by more than noise, or none was timed."""
    if results.versions.get("architecture") != f"sm_{measured.architecture}":
        return [f"the results are of {results.versions.get('architecture', 'no NVIDIA GPU')}"]
    least, most = measured.vocabularies or (0, 0)
    shown = [
        one
        for one in evidence(results)
        if one.op == measured.op and least <= one.vocab <= most and measured.is_aligned in (None, one.is_aligned)
    ]
    if not shown:
        return ["no comparison of this class"]
    slower = [one for one in shown if (one.ratio > _EQUAL if measured.backend == "cuda" else one.ratio < 1 / _EQUAL)]
    return [f"{one.title}: {one.ratio:.2f}x" for one in slower]


def _op_of(row: Row) -> tuple[str, bool] | None:
    """The op of a row of ours, and whether a head pads its rows; None for what is no op's plain call."""
    if row.work in ("calls", "settings"):
        name = row.provider.split(",")[0]
        return (name, False) if "captured" not in row.provider else None
    if ", token_logprobs" in row.provider:
        return "token_logprobs", False
    return _OPS.get(row.work)
