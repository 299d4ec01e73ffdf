"""What the Triton kernels and their launchers do beside the conformance suite; under the interpreter alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton is not installed")
if not triton.knobs.runtime.interpret:
    pytest.skip("test_triton.py runs these under the interpreter", allow_module_level=True)

import triton.language as tl  # noqa: E402
from testing.calls import call, leaves, run  # noqa: E402
from testing.cases import Case  # noqa: E402
from testing.gpu_heads import CASES, GPU_HEADS, assert_gpu_head_conforms  # noqa: E402
from testing.inputs import build  # noqa: E402

from grpo_kernels import GRPOLossConfig, check_device_values, group_advantages, grpo_loss  # noqa: E402
from grpo_kernels.device_values import first_bad  # noqa: E402
from grpo_kernels.ops.rows.triton import grpo_loss as loss_kernels  # noqa: E402
from grpo_kernels.ops.rows.triton import softmax as triton_math  # noqa: E402
from grpo_kernels.ops.rows.triton import token_logprobs as triton_kernels  # noqa: E402
from grpo_kernels.ops.rows.triton.launch import Blocks  # noqa: E402
from grpo_kernels.ops.tokens.triton.policy_math import decode, encode  # noqa: E402

OPS = torch.ops.grpo_kernels
CPU = torch.device("cpu")
KL = GRPOLossConfig(beta=0.1, entropy_coef=0.05)


@pytest.fixture(autouse=True)
def nothing_bad() -> Iterator[None]:
    yield
    check_device_values(CPU)


def _assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], rtol: float, atol: float) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def _use(monkeypatch: pytest.MonkeyPatch, blocks: Blocks) -> None:
    for module in (triton_kernels, loss_kernels):
        monkeypatch.setattr(module, "blocks_of", lambda *_: blocks)


@pytest.mark.parametrize("vocab", [1, 7, 511, 512, 513, 1023, 1024, 1025, 2048, 3001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_interpreted_blocks_cover_rows_of_any_length(
    vocab: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block of 512: rows shorter, as long, one longer, of several blocks; beginning anywhere, each written once."""
    _use(monkeypatch, Blocks(num_warps=1, unroll=2, per_processor=1))
    case = Case("rows", batch=1, length=3, vocab=vocab, config=KL)
    inputs = build(case, dtype)
    expected = run("grpo_loss", inputs, "torch")
    for op in ("grpo_loss", "token_logprobs"):
        got, reference = run(op, inputs, "triton"), run(op, inputs, "torch")
        for name in got:
            torch.testing.assert_close(
                got[name], reference[name], rtol=2e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
    leaf = leaves("grpo_loss", inputs)
    leaf["logits"] = inputs.logits.clone().requires_grad_()
    call("grpo_loss", inputs, leaf, "triton", inplace=True).loss.backward()
    torch.testing.assert_close(leaf["logits"].grad, expected["dlogits"], rtol=2e-3, atol=2e-5)
    assert leaf["logits"].grad.data_ptr() == leaf["logits"].data_ptr()


@pytest.mark.parametrize("blocks", [Blocks(1, 2, 1), Blocks(2, 2, 4), Blocks(1, 4, 20), Blocks(4, 2, 2)], ids=str)
def test_interpreted_programs_take_rows_in_turns(blocks: Blocks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of programs, and of warps: more rows than programs, as many, fewer."""
    inputs = build(CASES["next_token_layout"], torch.float32)
    expected = run("grpo_loss", inputs, "torch")
    _use(monkeypatch, blocks)
    _assert_close(run("grpo_loss", inputs, "triton"), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "op", ["token_logprobs", "grpo_loss", "linear_token_logprobs", "linear_grpo_loss", "policy_loss"]
)
def test_interpreted_runs_are_bit_equal(op: str) -> None:
    source = {"p": "logprobs", "l": "hidden"}.get(op[0], "logits")
    inputs = build(Case("twice", batch=3, length=4, vocab=700, config=KL), torch.float32, source)
    first, second = run(op, inputs, "triton"), run(op, inputs, "triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


def _loss_arguments(logits: Tensor, ids: Tensor) -> list[Any]:
    count = ids.numel()
    one, mask = torch.ones(()), torch.ones(count, dtype=torch.bool)
    code = GRPOLossConfig().code()
    loss = (code.options, code.params, 1.0, 0.0, 1.0)
    advantages = torch.ones(1, count)
    return [logits, ids, mask, None, advantages, one, *(None,) * 4, None, 1, False, 0.0, *loss, logits.clone()]


@pytest.mark.parametrize("bad", [-1, -100, 11, 2**40])
def test_interpreted_ids_outside_the_vocabulary_are_held_and_told_once(bad: int) -> None:
    """Public functions refuse them on the CPU, so the registered ops are called."""
    logits, ids = torch.randn(2, 3, 11), torch.randint(0, 11, (2, 3))
    ids[1, 1], ids[1, 2] = bad, bad
    expected = logits.log_softmax(-1).gather(-1, ids.clamp(0, 10)[..., None])[..., 0]
    for op, arguments in (
        (OPS.token_logprobs_fwd_triton, [logits, ids, None, 1.0, 0.0, 1.0, 0]),
        (OPS.grpo_loss_fwd_triton, _loss_arguments(logits, ids)),
    ):
        torch.testing.assert_close(op(*arguments)[0], expected)
        with pytest.raises(ValueError, match=r"call on cpu was given an id outside the vocabulary .*, at 4$"):
            check_device_values(CPU)
        check_device_values(CPU)


@pytest.mark.parametrize("vocab", [511, 1101])
def test_interpreted_gradients_may_be_narrower_than_logits_whose_rows_begin_anywhere(vocab: int) -> None:
    """In memory of their own, with rows as far apart as the logits'."""
    logits, ids = torch.randn(2, 3, vocab), torch.randint(0, vocab, (2, 3))
    wide = _loss_arguments(logits, ids)
    narrow = [*wide[:-1], torch.empty(2, 3, vocab, dtype=torch.float16)]
    for arguments in (wide, narrow):
        OPS.grpo_loss_fwd_triton(*arguments)
    torch.testing.assert_close(narrow[-1].float(), wide[-1], rtol=1e-3, atol=1e-6)


def test_interpreted_ids_of_chunks_are_told_by_their_place_in_the_whole() -> None:
    hidden, weight, ids = torch.randn(6, 4), torch.randn(11, 4), torch.randint(0, 11, (6,))
    mask = torch.tensor([True, False, True, True, True, True])
    ids[1], ids[4] = 99, 99  # the first is masked
    head_arguments = [hidden, weight, None, torch.float32, torch.float32, 2 * 11 * 4, True]
    OPS.linear_token_logprobs_fwd_triton(*head_arguments, ids, mask, 1.0, 0.0, 1.0, 0, 0, False)
    with pytest.raises(ValueError, match=r"at 4$"):
        check_device_values(CPU)


def test_interpreted_infinite_rewards_are_told() -> None:
    rewards = torch.tensor([[1.0], [2.0], [3.0], [float("-inf")]])
    OPS.group_advantages_triton(rewards, torch.ones(1), 2, 0, 0, 1e-4)
    with pytest.raises(ValueError, match="an earlier call on cpu was given an infinite reward, at 3"):
        check_device_values(CPU)
    arguments = _loss_arguments(torch.randn(4, 2, 5), torch.zeros(4, 2, dtype=torch.long))
    arguments[4], arguments[10:14] = None, [rewards[:, 0].contiguous(), 2, True, 1e-4]
    OPS.grpo_loss_fwd_triton(*arguments)
    with pytest.raises(ValueError, match="an infinite reward, at 3"):
        check_device_values(CPU)


@pytest.mark.parametrize(("groups", "size"), [(1, 1), (12, 3), (2, 20)])
@pytest.mark.parametrize("packed", [False, True])
def test_interpreted_advantages_of_more_completions_than_lanes(
    groups: int, size: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Missing rewards, groups of equal ones, and, packed, completions without a token."""
    _use(monkeypatch, Blocks(1, 2, 2))
    count = groups * size
    rewards = torch.randn(count)
    rewards[::7], rewards[: count // 2 : 5] = 0.1, float("nan")
    rewards[-size:] = 0.7
    lengths = torch.arange(count) % 3 if packed else torch.ones(count, dtype=torch.long)
    lengths[-1] = 1
    shape = (1, int(lengths.sum())) if packed else (count, 1)
    arguments = _loss_arguments(torch.randn(*shape, 5), torch.zeros(shape, dtype=torch.long))
    arguments[3] = torch.arange(count, dtype=torch.int32).repeat_interleave(lengths) if packed else None
    arguments[4], arguments[10:14] = None, [rewards, size, packed, 1e-4]
    made = OPS.grpo_loss_fwd_triton(*arguments)[3]
    scale = "group" if packed else "none"
    expected = group_advantages(rewards.double(), size, scale_rewards=scale, backend="torch").float()
    torch.testing.assert_close(made, expected, rtol=1e-6, atol=1e-7)


def test_interpreted_debug_tells_of_earlier_calls() -> None:
    logits, ids, mask = torch.randn(2, 3, 11), torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3)
    first_bad(CPU)[0] = 5
    with pytest.raises(ValueError, match=r"an earlier call on cpu was given an id outside the vocabulary .*, at 5"):
        grpo_loss(logits, ids, torch.ones(2), mask, debug=True, backend="triton")
    grpo_loss(logits, ids, torch.ones(2), mask, debug=True, backend="triton")


def test_interpreted_raw_ops_refuse_what_does_not_fit() -> None:
    logits, ids = torch.randn(2, 3, 11), torch.zeros(2, 3, dtype=torch.long)
    good = _loss_arguments(logits, ids)
    OPS.grpo_loss_fwd_triton(*good)
    short, wide = torch.ones(5), torch.ones(6, dtype=torch.float64)
    for position, bad in ((1, ids.int()), (1, ids[:, :1]), (2, torch.ones(5, dtype=torch.bool)), (4, short), (5, wide),
                          (6, short), (14, [0]), (19, logits[:, :2])):  # fmt: skip
        with pytest.raises(ValueError):
            OPS.grpo_loss_fwd_triton(*good[:position], bad, *good[position + 1 :])
    lse = torch.ones(6, dtype=torch.float64)
    rest = (1.0, 0.0, 1.0, logits.clone())
    OPS.token_logprobs_bwd_triton(logits, ids, None, *(wide.float(), lse, wide.float()), wide.float(), None, *rest)
    with pytest.raises(ValueError, match=r"lse must hold 6 contiguous values of torch\.float64"):
        OPS.token_logprobs_bwd_triton(logits, ids, None, *(wide.float(), lse.float(), wide.float()), None, None, *rest)
    with pytest.raises(ValueError, match="rewards"):
        OPS.group_advantages_triton(torch.ones(3, 1), torch.ones(1), 2, 0, 0, 1e-4)


@triton.jit
def _tanh_kernel(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    n = tl.arange(0, BLOCK)
    tl.store(y_ptr + n, triton_math.tanh(tl.load(x_ptr + n, mask=n < count, other=0.0)), mask=n < count)


def test_interpreted_tanh_is_within_two_ulps() -> None:
    x = torch.cat(
        [torch.linspace(-12, 12, 4001), torch.linspace(-0.6, 0.6, 4001), torch.tensor([torch.inf, -torch.inf])]
    )
    y = torch.empty_like(x)
    _tanh_kernel[(1,)](x, y, x.numel(), BLOCK=8192)
    exact = x.double().tanh()
    ulp = torch.finfo(torch.float32).eps * exact.abs().clamp(min=1e-30)
    assert ((y.double() - exact).abs() <= 2 * ulp).all()


@triton.jit(do_not_specialize=["loss_params"])
def _decode_kernel(y_ptr, loss_params):
    tl.store(y_ptr, decode(loss_params.ratio_low, y_ptr.dtype.element_ty))
    tl.store(y_ptr + 1, decode(loss_params.kl_clamp, y_ptr.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_interpreted_parameters_are_exact(dtype: torch.dtype) -> None:
    for values in ((0.1, math.inf), (0.0, 1e-28 / 3), (-math.inf, 1 / 3), (-0.0, 3.4e38 / 3)):
        y = torch.empty(2, dtype=dtype)
        _decode_kernel[(1,)](y, encode([values[0], *[1.0] * 6, values[1]]))
        assert y.tolist() == torch.tensor(values, dtype=dtype).tolist()


@pytest.mark.parametrize(("op", "name"), GPU_HEADS)
def test_interpreted_heads_of_a_gpu(op: str, name: str) -> None:
    assert_gpu_head_conforms(op, CASES[name], "triton")
