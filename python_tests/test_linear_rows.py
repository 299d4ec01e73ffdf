"""Which rows the linear ops project, chunks of them, live ones packed, a bound on their number; and by which GEMMs."""

from __future__ import annotations

import pytest
import torch
from testing.calls import run
from testing.cases import Case
from testing.gpu_heads import peak_bytes
from testing.inputs import build
from torch import Tensor

from grpo_kernels import GRPOLossConfig
from grpo_kernels.ops.head import gemm
from grpo_kernels.ops.head.buffers import HeadGradients, NeededGradients
from grpo_kernels.ops.head.gemm import project_back
from grpo_kernels.ops.head.selection import pack_rows, row_chunks


def test_chunks_are_of_about_equal_size_and_of_a_multiple() -> None:
    def sizes(*arguments: int) -> list[int]:
        return [chunk.stop - chunk.start for chunk in row_chunks(*arguments)]

    assert sizes(0, 10, 3) == [3, 3, 3, 1] and sizes(4, 4, 3) == [] and sizes(0, 2, 1) == [1, 1]
    assert sizes(0, 8192, 2923, 128) == [2816, 2816, 2560]
    assert sizes(0, 8192, 512, 128) == [512] * 16
    assert sizes(0, 100, 2923, 128) == [100]
    assert sizes(0, 1000, 100, 128) == [100] * 10  # the bound goes before the multiple


def test_packing_rows_moves_the_named_ones_up() -> None:
    values = torch.arange(40.0).view(20, 2)
    index = torch.tensor([0, 3, 4, 5, 9, 10, 11, 12, 13, 17, 19])
    expected = values[index].clone()
    assert torch.equal(pack_rows(values, index), expected)
    assert pack_rows(values, index[:0]).shape == (0, 2)


@pytest.mark.parametrize("bound", [6, 7, 12, 100])
def test_a_bound_on_live_rows_changes_nothing(bound: int) -> None:
    """Masked, dead and clipped rows among them; in one chunk and in many."""
    case = Case("bound", batch=3, length=4, vocab=31, mask="holes", advantages="some", ref=False)
    inputs = build(case, torch.float32).double()
    live = int(((inputs.mask != 0) & (inputs.advantages != 0)[:, None]).sum())
    assert 0 < live <= 6
    expected = run("linear_grpo_loss", inputs, "cpu")
    for workspace in (None, 31 * 8 * 5):
        got = run("linear_grpo_loss", inputs, "cpu", max_live_rows=bound, workspace_bytes=workspace)
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}")
    with pytest.raises(ValueError, match=f"max_live_rows must be at least {live}, the rows that may be live, got 1"):
        run("linear_grpo_loss", inputs, "cpu", max_live_rows=1)


def test_a_bound_on_live_rows_needs_a_loss_token_by_token() -> None:
    inputs = build(Case("bound", config=GRPOLossConfig(importance_sampling_level="sequence")), torch.float32)
    with pytest.raises(ValueError, match="max_live_rows must be None where a ratio waits for its sequence, got 3"):
        run("linear_grpo_loss", inputs, "cpu", max_live_rows=3)
    with pytest.raises(ValueError, match="max_live_rows must be at least 0, got -1"):
        run("linear_grpo_loss", inputs, "cpu", max_live_rows=-1)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 10, 13])
def test_few_rows_lose_no_more_digits_than_many(rows: int, threads: int) -> None:
    """Libraries sum the vocabulary in sequence for few rows: one on Intel, three on AMD, 15 with MKL_CBWR.

    The same rows alone and among others, each by its own size: what is not the sum's is then alike.
    """
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 16), 0.02 * torch.randn(129280, 16)
    dlogits = (hidden @ weight.mT).softmax(-1)
    exact = dlogits.double() @ weight.double()

    def error(count: int) -> Tensor:  # [count]
        off = project_back(dlogits[:count], weight, torch.float32).double() - exact[:count]
        return off.norm(dim=-1) / exact[:count].norm(dim=-1)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert error(rows).max() <= 4 * error(64).max()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("inputs", "out"),
    [
        (torch.float32, torch.float64), (torch.float32, torch.bfloat16), (torch.float64, torch.float32),
        (torch.bfloat16, torch.float32), (torch.bfloat16, torch.float64), (torch.float16, torch.bfloat16),
    ],
)  # fmt: skip
@pytest.mark.parametrize("add", [False, True])
def test_gemms_of_any_dtypes_are_asked_for_what_cuda_has(
    inputs: torch.dtype, out: torch.dtype, add: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On meta tensors, which refuse what a GPU's GEMM refuses."""
    monkeypatch.setattr(gemm, "writes_fp32", lambda device: True)
    a, b, c = (torch.empty(shape, dtype=kind, device="meta") for shape, kind in
               (((3, 4), inputs), ((4, 5), inputs), ((3, 5), out)))  # fmt: skip
    assert gemm.matmul(a, b, c, add=add).dtype == out


@pytest.mark.parametrize(
    ("chunks", "parameter", "expected"),
    [
        (0, torch.bfloat16, torch.bfloat16),
        (1, torch.bfloat16, torch.bfloat16),
        (2, torch.bfloat16, torch.float32),
        (1, torch.float32, torch.float32),
    ],
)
def test_the_weights_gradient_of_one_chunk_is_made_as_the_parameter_has_it(
    chunks: int, parameter: torch.dtype, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, in half the memory and without a conversion; sums of several are fp32."""
    half = torch.bfloat16
    monkeypatch.setattr(gemm, "writes_fp32", lambda device: True)
    projection = gemm.Head(torch.randn(6, 4).to(parameter), None, half, torch.float32, half)
    grads = HeadGradients(projection, torch.empty(8, 4, dtype=half), NeededGradients(False, True, False), chunks)
    assert grads.dweight is not None and grads.dweight.dtype == expected
    if expected == half:
        dlogits, inputs = torch.randn(8, 6).to(half), torch.randn(8, 4).to(half)
        grads.add(dlogits, inputs, slice(0, 8))
        found = grads.results()[1]
        assert found.data_ptr() == grads.dweight.data_ptr()
        sums = dlogits.double().t() @ inputs.double()
        bound = sums.abs() * 2**-8 + (dlogits.double().abs().t() @ inputs.double().abs()) * 8 * 2**-24
        assert ((found.double() - sums).abs() <= bound).all()


def test_a_cpu_sums_one_chunks_dweight_in_fp32_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GEMM there rounds fp32 sums to bf16, but no fp32 ``dW`` exists either."""
    rows, vocab, size, half = 8, 4000, 64, torch.bfloat16
    monkeypatch.setattr(gemm, "_ROUNDED_BYTES", 100 * size * 4)
    head = gemm.Head(torch.zeros(vocab, size, dtype=half), None, half, torch.float32, torch.float32)
    dlogits, inputs = torch.randn(rows, vocab), torch.randn(rows, size)

    def add() -> Tensor:
        made = HeadGradients(head, inputs.to(half), NeededGradients(False, True, False), 1)
        made.add(dlogits, inputs, slice(0, rows))
        return made.results()[1]

    found = add()
    exact = dlogits.double().t() @ inputs.double()
    bound = exact.abs() * 2**-8 + (dlogits.double().abs().t() @ inputs.double().abs()) * 8 * 2**-24
    assert found.dtype == half and ((found.double() - exact).abs() <= bound).all()
    assert peak_bytes(add) <= found.nbytes + 2 * 100 * size * 4 + rows * size * 2
