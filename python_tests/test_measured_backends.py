"""What "auto" takes on a GPU: Triton, but where a committed result shows that another backend is faster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gpu.evidence import Evidence, contradictions, evidence
from records import Results, Row

from grpo_kernels import backends
from grpo_kernels.measured_backends import MEASURED, Measured, RowClass

ROOT = Path(__file__).parents[1]
GPU = torch.device("cuda", 0)
LARGE = Measured("grpo_loss", 90, "cuda", "results.json", (65536, 262144), is_aligned=True)
POLICY = Measured("policy_loss", 90, "cuda", "results.json")


@pytest.mark.parametrize("measured", MEASURED, ids=str)
def test_every_entry_is_what_its_results_show(measured: Measured) -> None:
    assert contradictions(measured, Results.load(ROOT / measured.results)) == []


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hopper GPU on which every backend runs, and two entries."""
    monkeypatch.setattr(backends, "_architecture", lambda device: 90)
    monkeypatch.setattr(backends, "unsupported_reason", lambda op, backend, device: None)
    monkeypatch.setattr(backends, "_CUDA_ERROR", "not asked for")
    monkeypatch.setattr(backends, "MEASURED", (LARGE, POLICY))


@pytest.mark.parametrize(
    ("op", "rows", "expected"),
    [
        ("grpo_loss", RowClass(151936, True), "cuda"),
        ("grpo_loss", RowClass(151937, False), "triton"),
        ("grpo_loss", RowClass(32000, True), "triton"),
        ("grpo_loss", None, "triton"),
        ("token_logprobs", RowClass(151936, True), "triton"),
        ("policy_loss", None, "cuda"),
    ],
)
def test_an_entry_holds_for_its_op_and_its_rows(hopper: None, op: str, rows: RowClass | None, expected: str) -> None:
    given = None if rows is None else lambda: rows
    assert backends.resolve(op, "auto", GPU, given) == expected
    assert backends.resolve(op, "triton", GPU, given) == "triton"


def test_an_entry_holds_for_its_architecture(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_architecture", lambda device: 100)
    assert backends.resolve("grpo_loss", "auto", GPU, lambda: RowClass(151936, True)) == "triton"


def test_what_cannot_run_is_not_taken(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {"cuda": "it is not built"}
    monkeypatch.setattr(backends, "unsupported_reason", lambda op, backend, device: reasons.get(backend))
    assert backends.resolve("grpo_loss", "auto", GPU, lambda: RowClass(151936, True)) == "triton"


def test_where_nothing_is_measured_it_is_triton(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "MEASURED", ())
    assert {backends.resolve(op, "auto", GPU, lambda: RowClass(151936, True)) for op in backends.OPS} == {"triton"}


@pytest.mark.parametrize(
    ("shape", "stride", "dtype", "expected"),
    [
        ((4, 151936), (151936, 1), torch.bfloat16, True),
        ((4, 131071), (131071, 1), torch.bfloat16, False),
        ((4, 131071), (131072, 1), torch.bfloat16, False),
        ((4, 8), (12, 1), torch.bfloat16, False),
        ((2, 3, 4), (12, 4, 1), torch.float32, True),
        ((2, 3, 4), (12, 4, 1), torch.bfloat16, False),
    ],
)
def test_rows_are_aligned_by_whole_loads(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, expected: bool
) -> None:
    logits = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    assert RowClass.of_logits(logits) == (shape[-1], expected)
    assert RowClass.of_head(torch.empty(7, 3, device="meta")) == (7, True)


def test_a_result_shows_which_backend_is_faster() -> None:
    def row(work: str, provider: str, median_ms: float, vocab: int, dtype: str = "bfloat16") -> Row:
        times = {"median_ms": median_ms, "p20_ms": 1.0, "p80_ms": 1.0, "rounds": 3}
        return Row(work, f"{work} V={vocab}", provider, {"N": 8, "V": vocab}, dtype, **times)

    results = Results("here", "2026-01-02", {"architecture": "sm_90"}, [
        row("logits", "grpo_kernels, CUDA", 1.0, 151936), row("logits", "grpo_kernels, Triton", 2.0, 151936),
        row("logits", "grpo_kernels, CUDA, token_logprobs", 3.0, 50257),
        row("logits", "grpo_kernels, Triton, token_logprobs", 1.0, 50257),
        row("hidden", "grpo_kernels, CUDA", 1.5, 50257), row("hidden", "grpo_kernels, Triton", 1.0, 50257),
        row("calls", "grpo_loss, CUDA", 1.0, 128), row("calls", "grpo_loss, Triton", 4.0, 128),
        row("calls", "grpo_loss, captured, CUDA", 1.0, 128), row("calls", "grpo_loss, captured, Triton", 4.0, 128),
        row("logits", "naive PyTorch", 9.0, 151936), row("hidden", "grpo_kernels, CUDA, bf16 logits", 1.0, 50257),
    ])  # fmt: skip
    assert evidence(results) == [
        Evidence("grpo_loss", 151936, True, "logits V=151936", 0.5),
        Evidence("token_logprobs", 50257, False, "logits V=50257", 3.0),
        Evidence("linear_grpo_loss", 50257, True, "hidden V=50257", 1.5),
        Evidence("grpo_loss", 128, True, "calls V=128", 0.25),
    ]
    assert contradictions(LARGE, results) == []
    assert contradictions(replace(LARGE, backend="triton"), results) == ["logits V=151936: 0.50x"]
    assert contradictions(replace(LARGE, architecture=100), results) == ["the results are of sm_90"]
    assert contradictions(replace(LARGE, vocabularies=(1, 64)), results) == ["no comparison of this class"]
    assert contradictions(replace(LARGE, op="token_logprobs", is_aligned=True), results) != []
