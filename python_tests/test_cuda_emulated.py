"""The CUDA kernels beside the conformance suite, emulated: each path that a device, a stride or a dtype chooses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from testing.assertions import assert_near_baseline
from testing.calls import call, leaves, run
from testing.cases import FOUND_CASES, INPUT_CASES, LOSS_CASES, Case
from testing.emulated import emulated
from testing.expected import Expected
from testing.inputs import build

from grpo_kernels import GRPOLossConfig, backends, check_device_values, grpo_loss
from grpo_kernels.ops.head import driver

if backends.cuda_architectures():
    pytest.skip("test_gpu.py runs the kernels themselves", allow_module_level=True)

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("poison", "one_thread")]
CPU = torch.device("cpu")
OPS = torch.ops.grpo_kernels
CASES = {case.name: case for case in (*INPUT_CASES, *LOSS_CASES, *FOUND_CASES)}
KL = GRPOLossConfig(beta=0.1, entropy_coef=0.05)
#: No clusters; clusters of up to 8 blocks; one block of which a multiprocessor has one; rows that no cluster holds.
DEVICES = {
    "sm_80": {"capability": 80},
    "clusters": {"shared_bytes": 3072},
    "large_rows": {"shared_bytes": 1100},
    "one_processor": {"processors": 1},
}


@pytest.fixture(autouse=True)
def nothing_bad() -> Iterator[None]:
    with emulated():
        yield
        check_device_values(CPU)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [case for case in (*INPUT_CASES, *FOUND_CASES) if not case.bias], ids=str)
def test_a_loss_is_near_its_fp64_baseline_on_any_device(case: Case, device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs = build(case, dtype, "logits")
        expected = Expected.of("grpo_loss", inputs, dtype)
        with emulated(**DEVICES[device]):
            expected.assert_near(run("grpo_loss", inputs, "cuda"))


@pytest.mark.parametrize("vocab", [8, 64, 1016, 1024, 1032, 2048, 4104, 9000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_clusters_cover_rows_of_any_length_in_place(vocab: int, dtype: torch.dtype, softcap: float | None) -> None:
    """Rows of whole vectors, of which the last block of a cluster has fewer than the others, or none."""
    case = Case("rows", batch=2, length=3, vocab=vocab, softcap=softcap, layout="next", config=KL)
    inputs = build(case, dtype, "logits")
    reference, baseline = run("grpo_loss", inputs, "torch"), run("grpo_loss", inputs.double(), "torch")
    leaf = leaves("grpo_loss", inputs)
    leaf["logits"] = inputs.logits.clone().requires_grad_()
    with emulated(shared_bytes=3072):
        call("grpo_loss", inputs, leaf, "cuda", inplace=True).loss.backward()
    got = {"dlogits": leaf["logits"].grad}
    assert_near_baseline(got, {"dlogits": reference["dlogits"]}, {"dlogits": baseline["dlogits"]}, dtype)
    assert leaf["logits"].grad.data_ptr() == leaf["logits"].data_ptr()


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("stride", [64, 65, 72])
def test_rows_that_begin_anywhere_are_read_and_written_whole(offset: int, stride: int) -> None:
    memory = torch.randn(4 * stride + offset + 64)
    logits = memory[offset:].as_strided((1, 4, 64), (4 * stride, stride, 1))
    ids, mask = torch.tensor([[0, 63, 5, 17]]), torch.ones(1, 4)
    outside = torch.ones(memory.shape, dtype=torch.bool)
    outside[offset:].as_strided((4, 64), (stride, 1)).fill_(False)
    expected_leaf = logits.clone().requires_grad_()
    grpo_loss(expected_leaf, ids, torch.ones(1), mask, config=GRPOLossConfig(), backend="torch").loss.backward()
    kept = memory[outside].clone()
    leaf = logits.detach().requires_grad_()
    grpo_loss(leaf, ids, torch.ones(1), mask, config=GRPOLossConfig(), inplace=True, backend="cuda").loss.backward()
    torch.testing.assert_close(leaf.grad, expected_leaf.grad, rtol=1e-5, atol=1e-7)
    assert torch.equal(memory[outside], kept)


def test_ids_outside_are_held_and_told() -> None:
    logits, mask = torch.randn(1, 4, 40), torch.tensor([[True, True, False, True]])
    ids = torch.tensor([[3, 40, -100, 39]])
    held = ids.clamp(0, 39)
    got = OPS.token_logprobs_fwd_cuda(logits, ids, mask, 1.0, 0.0, 1.0, 0)[0]
    with pytest.raises(ValueError, match="an id outside the vocabulary where unmasked, at 1"):
        check_device_values(CPU)
    assert torch.equal(got, OPS.token_logprobs_fwd_cuda(logits, held, mask, 1.0, 0.0, 1.0, 0)[0])
    assert driver.clamp_ids("cuda", ids[0], mask[0], 40).tolist() == [3, 39, 0, 39]
    with pytest.raises(ValueError, match="at 1"):
        check_device_values(CPU)


def test_infinite_rewards_are_told() -> None:
    rewards, code = torch.tensor([1.0, float("inf"), 0.0, 1.0]), GRPOLossConfig().code()
    mask, one = torch.ones(8, dtype=torch.bool), torch.ones(())
    advantages = OPS.grpo_loss_fwd_cuda(
        torch.randn(4, 2, 16), torch.zeros(4, 2, dtype=torch.long), mask, None, None, one, *(None,) * 4, rewards, 2,
        True, 1e-4, code.options, code.params, 1.0, 0.0, 1.0, None,
    )[3]  # fmt: skip
    assert advantages[:2].eq(0).all() and advantages[2:].ne(0).all()
    with pytest.raises(ValueError, match="an infinite reward, at 1"):
        check_device_values(CPU)
    assert OPS.group_advantages_cuda(rewards[:, None], torch.ones(1), 2, 0, 0, 1e-4)[:2].eq(0).all()
    with pytest.raises(ValueError, match="an infinite reward, at 1"):
        check_device_values(CPU)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_reaches_the_loss(value: float) -> None:
    logits = torch.randn(1, 2, 64)
    logits[0, 1, 5] = value
    for device in ({}, DEVICES["sm_80"]):
        with emulated(**device):
            ids, mask = torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2)
            found = grpo_loss(logits, ids, torch.ones(1), mask, backend="cuda")
        assert found.loss.isnan() and found.logprobs[0, 0].isfinite()


def test_a_row_without_a_finite_logit_has_no_result() -> None:
    logits = torch.full((1, 2, 64), -float("inf"))
    logits[0, 0, 3] = 0.0
    found = OPS.token_logprobs_fwd_cuda(logits, torch.full((1, 2), 3), None, 1.0, 0.0, 1.0, 0)[:3]
    assert all(values[0, 0] == 0 and values[0, 1].isnan() for values in found)


def test_the_coldest_softmax_is_an_argmax() -> None:
    logits = torch.randn(1, 3, 64)
    ids = logits.argmax(-1)
    for temperature in (1e-7, 1e-12, 1e-30):
        logprobs, _, entropy = OPS.token_logprobs_fwd_cuda(logits, ids, None, temperature, 0.0, 1.0, 0)[:3]
        assert logprobs.eq(0).all() and entropy.eq(0).all()


def test_runs_are_bit_equal_whatever_the_number_of_blocks() -> None:
    inputs = build(CASES["vocab_block"], torch.bfloat16, "logits")
    runs = []
    for processors in (2, 2, 100):
        with emulated(processors=processors):
            runs.append(run("grpo_loss", inputs, "cuda"))
    for other in runs[1:]:
        assert all(torch.equal(runs[0][name], other[name]) for name in runs[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_gradient_is_scaled_where_it_lies(dtype: torch.dtype) -> None:
    memory = torch.randn(3, 41, dtype=dtype)
    for rows in (memory.clone(), memory.clone()[:, 1:38]):
        expected = (rows.to(torch.float64) * -0.375).to(dtype)
        OPS.scale_cuda(rows, torch.tensor(1.0))
        OPS.scale_cuda(rows, torch.tensor(-0.375))
        assert torch.equal(rows, expected)


@pytest.mark.parametrize("rows", [1, 63, 64, 200])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.9, 1.0])
@pytest.mark.parametrize(("vocab", "width"), [(64, 64), (37, 40), (7, 8), (3, 4), (61, 63)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_live_rows_are_packed_where_they_lie(
    rows: int, share: float, vocab: int, width: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(rows)
    live = torch.rand(rows, generator=generator) < share
    memory = torch.randn(rows, width, generator=generator).to(dtype)
    values = memory[:, :vocab].masked_fill_(~live[:, None], 0)
    before, beside = values.clone(), memory[:, vocab:].clone()
    order, count = OPS.pack_rows_cuda(values, live)
    assert count == live.sum() and sorted(order.tolist()) == list(range(rows)) and live[order[:count]].all()
    assert torch.equal(values, before[order]) and torch.equal(memory[:, vocab:], beside)
    stayed = (order[:count] == torch.arange(int(count))).sum()
    assert stayed == live[: int(count)].sum(), "none moves that need not"
