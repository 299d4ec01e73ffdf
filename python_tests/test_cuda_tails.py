"""CUDA kernels, emulated, over aligned rows of any vocabulary, as heads pad them: by 16 bytes, but for their ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from test_cuda_emulated import DEVICES, KL
from testing.assertions import assert_near_baseline
from testing.calls import call, leaves, run
from testing.cases import Case
from testing.emulated import emulated
from testing.inputs import Inputs, build
from torch import Tensor

from grpo_kernels import GRPOLossConfig, check_device_values
from grpo_kernels.ops.head.gemm import row_width

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("poison", "one_thread")]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
OPS = torch.ops.grpo_kernels
#: Less than a vector; an element before and after whole vectors; more than a block of threads, and than several.
VOCABULARIES = [1, 3, 7, 9, 1021, 1025, 4099]


@pytest.fixture(autouse=True)
def nothing_bad() -> Iterator[None]:
    with emulated():
        yield
        check_device_values(CPU)


def _padded(inputs: Inputs) -> tuple[Inputs, Tensor]:
    """The inputs with logits in rows apart, as a head's workspace has them, and the memory beside these, of NaN."""
    (batch, length, vocab), dtype = inputs.logits.shape, inputs.logits.dtype
    memory = torch.full((batch, length, row_width(vocab, dtype, GPU)), torch.nan, dtype=dtype)
    memory[..., :vocab] = inputs.logits
    return replace(inputs, logits=memory[..., :vocab]), memory[..., vocab:]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("op", ["grpo_loss", "token_logprobs"])
def test_padded_rows_in_place(op: str, vocab: int, dtype: torch.dtype, softcap: float | None, device: str) -> None:
    """The tokens are the first, the last two and others: in the vectors and among the elements left."""
    case = Case("tails", batch=2, length=4, vocab=vocab, mask="ones", softcap=softcap, config=KL)
    inputs = build(case, dtype, "logits")
    inputs.ids[0, :3] = torch.tensor([0, vocab - 1, max(vocab - 2, 0)])
    reference, baseline = run(op, inputs, "torch"), run(op, inputs.double(), "torch")
    padded, beside = _padded(inputs)
    leaf = leaves(op, padded)
    leaf["logits"] = padded.logits.detach().requires_grad_()
    with emulated(**DEVICES[device]):
        if op == "grpo_loss":
            out = call(op, padded, leaf, "cuda", inplace=True)
            (gradient,) = torch.autograd.grad(out.loss, leaf["logits"])
        else:
            out = call(op, padded, leaf, "cuda", inplace_backward=True)
            upstream = [x.to(out.logprobs) for x in (padded.dlogprobs, padded.dentropy)]
            (gradient,) = torch.autograd.grad([out.logprobs, out.entropy], leaf["logits"], upstream)
    assert gradient.data_ptr() == padded.logits.data_ptr() and beside.isnan().all()
    fields = ("logprobs",) if op == "grpo_loss" else out._fields
    got = {name: getattr(out, name).detach() for name in fields}
    got["dlogits"] = gradient
    assert_near_baseline(got, {name: reference[name] for name in got}, {name: baseline[name] for name in got}, dtype)


def _gradient(op: str, logits: Tensor, ids: Tensor, dlogits: Tensor) -> None:
    """Of rows ``[1, n, V]``, one of which is masked in a loss."""
    rows, code = ids.shape[1], GRPOLossConfig().code()
    one, none = torch.ones(rows), (None, None, None, None)
    if op == "grpo_loss":
        mask = torch.arange(rows) != 2
        OPS.grpo_loss_fwd_cuda(logits, ids, mask, None, one[None], one[0], *none, None, 1, False, 0.0, code.options,
                               code.params, 0.7, 0.0, 1.0, dlogits)  # fmt: skip
        return
    found = OPS.token_logprobs_fwd_cuda(logits, ids, None, 0.7, 0.0, 1.0, 0)[:3]
    OPS.token_logprobs_bwd_cuda(logits, ids, None, *found, one[None], None, 0.7, 0.0, 1.0, dlogits)


def _rows(vocab: int, dtype: torch.dtype, width: int, count: int = 5) -> Tensor:  # [1, n, V]
    generator = torch.Generator().manual_seed(0)
    memory = torch.full((1, count, width), torch.nan, dtype=dtype)
    memory[..., :vocab] = torch.randn(count, vocab, generator=generator)
    return memory[..., :vocab]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [7, 1021, 1024, 4099])
@pytest.mark.parametrize("op", ["grpo_loss", "token_logprobs"])
def test_a_narrower_gradient_in_a_buffer_of_its_own(op: str, vocab: int, dtype: torch.dtype, device: str) -> None:
    """As heads have it: fp32 logits, and a gradient in half precision, rounded once."""
    logits = _rows(vocab, torch.float32, row_width(vocab, torch.float32, GPU))
    ids = torch.tensor([[0, vocab - 1, 1, vocab // 2, vocab - 2]])
    wide = _rows(vocab, torch.float32, row_width(vocab, torch.float32, GPU))
    buffer = torch.full((1, 5, row_width(vocab, dtype, GPU)), torch.nan, dtype=dtype)
    with emulated(**DEVICES[device]):
        _gradient(op, logits, ids, wide)
        _gradient(op, logits, ids, buffer[..., :vocab])
    assert torch.equal(buffer[..., :vocab], wide.to(dtype)) and buffer[..., vocab:].isnan().all()


def _statistics(logits: Tensor, ids: Tensor) -> None:
    OPS.token_logprobs_fwd_cuda(logits, ids, None, 1.0, 0.0, 1.0, 15)


def _loss(logits: Tensor, ids: Tensor) -> None:
    _gradient("grpo_loss", logits, ids, logits)


def _logprobs_gradient(logits: Tensor, ids: Tensor) -> None:
    _gradient("token_logprobs", logits, ids, logits)


def _pack(logits: Tensor, ids: Tensor) -> None:
    OPS.pack_rows_cuda(logits[0], ids[0] > 0)


@pytest.mark.parametrize("device", ["sm_80", "clusters"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("launch", [_statistics, _loss, _logprobs_gradient, _pack])
def test_a_padded_row_takes_the_kernel_of_whole_vectors(
    launch: Callable[[Tensor, Tensor], None], dtype: torch.dtype, device: str
) -> None:
    ids = torch.tensor([[0, 1, 2, 0, 4]])

    def kernel(vocab: int, width: int) -> int:
        launch(_rows(vocab, dtype, width), ids)
        return OPS.emulated_last_kernel()

    with emulated(**DEVICES[device]):
        assert kernel(1021, 1024) == kernel(1025, 1088) == kernel(1024, 1024) != kernel(1021, 1021)
