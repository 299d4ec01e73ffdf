"""The linear ops: how exact they are, and what is rounded where."""

from __future__ import annotations

import pytest
import torch
from testing.calls import call, cases_of, leaves, run
from testing.cases import INPUT_CASES, Case
from testing.inputs import Inputs, build
from torch import Tensor

from grpo_kernels import linear_token_logprobs, token_logprobs

CASES = {case.name: case for case in INPUT_CASES}
LINEAR = ("linear_token_logprobs", "linear_grpo_loss")
#: So few that a large vocabulary is summed in blocks.
FEW_ROWS = Case("few_rows", batch=1, length=3, vocab=5003, hidden=8)


@pytest.mark.parametrize("case", [CASES["bias"], FEW_ROWS], ids=str)
@pytest.mark.parametrize("op", LINEAR)
def test_autocast_rounds_the_inputs_and_not_the_gradients(op: str, case: Case) -> None:
    half = build(case, torch.bfloat16, "hidden")
    wide = half._map(lambda x: x.float() if x.is_floating_point() else x)
    expected = run(op, half, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        got = run(op, wide, "cpu")
    assert expected.keys() == got.keys()
    for name, value in got.items():
        if name in ("dhidden", "dweight", "dbias"):
            assert value.dtype == torch.float32
            assert torch.equal(value.to(torch.bfloat16), expected[name])
            assert not torch.equal(value, expected[name].float())
        else:
            assert torch.equal(value, expected[name]), name


def test_autocast_of_the_reference_rounds_the_inputs_alone() -> None:
    half = build(CASES["bias"], torch.bfloat16, "hidden")
    expected = call("linear_token_logprobs", half, leaves("linear_token_logprobs", half), "torch").logprobs
    wide = half._map(lambda x: x.float() if x.is_floating_point() else x)
    with torch.autocast("cpu", torch.bfloat16):
        got = call("linear_token_logprobs", wide, leaves("linear_token_logprobs", wide), "torch").logprobs
    assert torch.equal(got, expected)


def test_autocast_leaves_a_loss_from_logits_alone() -> None:
    inputs = build(CASES["plain"], torch.bfloat16)
    expected = run("grpo_loss", inputs, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        got = run("grpo_loss", inputs, "cpu")
    assert all(torch.equal(got[name], value) for name, value in expected.items())


@pytest.mark.parametrize("op", LINEAR)
def test_half_precision_logits_are_rounded_once(op: str) -> None:
    """With ``logits_dtype`` the log-probs are those of the rounded logits, to fp32's accuracy."""
    inputs = build(CASES["plain"], torch.bfloat16, "hidden")
    result = run(op, inputs, "cpu", logits_dtype=torch.bfloat16)
    exact = inputs.hidden.double() @ inputs.weight.double().mT
    expected = token_logprobs(exact.to(torch.bfloat16).double(), inputs.ids, mask=inputs.mask, backend="torch").logprobs
    off = (result["logprobs"] - expected).abs()
    # a sum that falls beside the middle of two bf16 values may be rounded to the other one
    assert off.median() < 1e-6 and off.max() < 0.1
    assert result["dhidden"].dtype == result["dweight"].dtype == torch.bfloat16


ACCURATE = [case for case in cases_of("token_logprobs") if case.softcap is None and case.mask != "zeros"]


@pytest.mark.parametrize("case", ACCURATE, ids=str)
def test_logprobs_from_fp32_logits_are_within_1e_5(case: Case) -> None:
    inputs = build(case, torch.float32)
    assert (_logprobs(inputs, "cpu") - _logprobs(inputs.double(), "torch")).abs().max() < 1e-5


def _logprobs(inputs: Inputs, backend: str) -> Tensor:
    return call("token_logprobs", inputs, leaves("token_logprobs", inputs), backend).logprobs.detach()


@pytest.mark.parametrize("vocab", [1000, 151936])
def test_linear_logprobs_have_at_most_twice_the_error_of_plain_torch(vocab: int) -> None:
    inputs = build(Case("accuracy", batch=2, length=8, vocab=vocab, hidden=256, mask="ones"), torch.float32, "hidden")
    exact = run("linear_token_logprobs", inputs.double(), "torch")["logprobs"]
    plain = (inputs.hidden @ inputs.weight.mT).log_softmax(-1).gather(-1, inputs.ids[..., None])[..., 0]
    got = linear_token_logprobs(inputs.hidden, inputs.weight, inputs.ids, backend="cpu").logprobs
    assert (got - exact).abs().max() <= 2 * (plain - exact).abs().max()
