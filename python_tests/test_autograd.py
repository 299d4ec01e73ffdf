"""What autograd is promised: who owns a gradient, when it is formed, and that it is the same every time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from testing.calls import BACKENDS, SOURCES, call, leaves, run
from testing.cases import INPUT_CASES, LOSS_CASES, Case
from testing.inputs import build
from torch import Tensor

from grpo_kernels import GRPOLossConfig, grpo_loss, linear_grpo_loss, policy_loss, token_logprobs
from grpo_kernels.ops.gradients import named_gradients

pytestmark = pytest.mark.usefixtures("poison")
CASES = {case.name: case for case in (*INPUT_CASES, *LOSS_CASES)}
LARGE = {
    "token": Case("large", batch=5, length=13, vocab=5003, mask="holes", config=GRPOLossConfig(entropy_coef=0.01)),
    "dead_rows": Case("large_dead", batch=5, length=13, vocab=5003, mask="holes", ref=False, advantages="some"),
    "sequence": Case("large_sequence", batch=5, length=13, vocab=5003, config=CASES["bias_sequence"].config),
}
FUSED = ("grpo_loss", "linear_grpo_loss")


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k].nan_to_num(), b[k].nan_to_num()) for k in a)


@pytest.fixture
def threads() -> Any:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", LARGE)
@pytest.mark.parametrize("op", SOURCES)
def test_runs_are_bit_equal_on_any_number_of_threads(op: str, kind: str, threads: Any) -> None:
    inputs = build(LARGE[kind], torch.float32, SOURCES[op])
    results = []
    for count in (1, 1, 2, 3):
        threads(count)
        results.append(run(op, inputs, "cpu"))
    assert _equal(results[0], results[1])
    if not op.startswith("linear"):  # a GEMM's own order may follow the number of threads
        assert _equal(results[0], results[2]) and _equal(results[0], results[3])
    else:
        threads(2)
        assert _equal(results[2], run(op, inputs, "cpu"))
        for name, value in results[0].items():
            for other in results[2:]:
                torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["plain", "next_token_layout", "strided", "dirty_mask", "strided_sequence",
                                  "packed_token_advantages", "grad_output"])  # fmt: skip
def test_in_place_gradient_is_the_same_gradient(name: str, dtype: torch.dtype) -> None:
    for op, option in (("grpo_loss", "inplace"), ("token_logprobs", "inplace_backward")):
        inputs = build(CASES[name], dtype)
        expected = run(op, inputs, "cpu")
        assert _equal(run(op, inputs.clone(), "cpu", **{option: True}), expected)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_in_place_gradient_lies_in_the_logits(level: str) -> None:
    inputs = build(Case("in_place", ref=False, config=GRPOLossConfig(importance_sampling_level=level)), torch.float32)
    leaf = leaves("grpo_loss", inputs)
    loss = call("grpo_loss", inputs, leaf, "cpu", inplace=True).loss
    loss.backward()
    assert leaf["logits"].grad.data_ptr() == leaf["logits"].data_ptr()
    assert torch.equal(leaf["logits"].grad, leaf["logits"].detach())


@pytest.mark.parametrize("grad_output", [1.0, -0.375])
@pytest.mark.parametrize("op", FUSED)
def test_backward_copies_no_gradient(op: str, grad_output: float) -> None:
    """The gradient formed in the forward is handed over in its own memory, scaled there unless by 1."""
    inputs = build(CASES["on_policy"], torch.float32, SOURCES[op])
    leaf = leaves(op, inputs)
    loss = call(op, inputs, leaf, "cpu").loss
    saved = [x for x in loss.grad_fn.saved_tensors if x is not None]
    before = [x.clone() for x in saved]
    gradients = torch.autograd.grad(loss, list(leaf.values()), torch.tensor(grad_output))
    assert {x.data_ptr() for x in gradients} == {x.data_ptr() for x in saved}
    for value, gradient in zip(before, gradients, strict=True):
        assert torch.equal(gradient, (value * grad_output).view(gradient.shape))


@pytest.mark.parametrize("op", FUSED)
def test_gradient_of_a_scaled_loss(op: str) -> None:
    inputs = build(CASES["plain"], torch.float32, SOURCES[op])
    leaf, scaled = leaves(op, inputs), leaves(op, inputs)
    call(op, inputs, leaf, "cpu").loss.backward()
    (call(op, inputs, scaled, "cpu").loss * 8 / 2).backward()
    for name, x in leaf.items():
        assert torch.equal(scaled[name].grad, 4 * x.grad)


@pytest.mark.parametrize("op", FUSED)
def test_second_backward_of_a_fused_op_is_refused(op: str) -> None:
    inputs = build(CASES["plain"], torch.float32, SOURCES[op])
    loss = call(op, inputs, leaves(op, inputs), "cpu").loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward is refused"):
        loss.backward()


@pytest.mark.parametrize("op", ["token_logprobs", "linear_token_logprobs", "policy_loss"])
def test_second_backward_of_an_unfused_op_is_right(op: str) -> None:
    inputs = build(CASES["plain"], torch.float32, SOURCES[op])
    leaf = leaves(op, inputs)
    result = call(op, inputs, leaf, "cpu")
    loss = result.loss if "loss" in result._fields else (result.logprobs * inputs.dlogprobs).sum()
    loss.backward(retain_graph=True)
    first = {name: x.grad.clone() for name, x in leaf.items() if x.grad is not None}
    loss.backward()
    for name, gradient in first.items():
        assert torch.equal(leaf[name].grad, 2 * gradient)


def test_second_backward_in_place_is_refused() -> None:
    inputs = build(CASES["plain"], torch.float32)
    out = token_logprobs(leaves("token_logprobs", inputs)["logits"], inputs.ids, inplace_backward=True, backend="cpu")
    out.logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward is refused"):
        out.logprobs.sum().backward()


def test_logits_overwritten_in_place_serve_nobody_else() -> None:
    """A graph that saved the logits for its own backward notices."""
    inputs = build(CASES["plain"], torch.float32)
    logits = leaves("grpo_loss", inputs)["logits"] * 1.0
    other = logits.square().sum()
    loss = grpo_loss(logits, inputs.ids, inputs.advantages, inputs.mask, inplace=True, backend="cpu").loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (other + loss).backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "options"), [*((op, {}) for op in SOURCES), ("grpo_loss", {"inplace": True})])
def test_no_grad_forms_no_gradient(op: str, options: dict[str, bool], backend: str) -> None:
    inputs = build(CASES["plain"], torch.float32, SOURCES[op])
    with torch.no_grad():
        result = call(op, inputs, leaves(op, inputs), backend, **options)
    without = call(op, inputs, inputs.tensors(), backend, **options)  # grad mode on, but nobody asks
    before = build(CASES["plain"], torch.float32, SOURCES[op]).tensors()
    for out in (result, without):
        assert not any(x.requires_grad for x in out if isinstance(x, Tensor))
    assert all(torch.equal(x, before[name]) for name, x in inputs.tensors().items())


@pytest.mark.parametrize("op", FUSED)
def test_no_grad_loss_is_the_same_loss(op: str) -> None:
    inputs = build(CASES["plain"], torch.float32, SOURCES[op])
    expected = call(op, inputs, leaves(op, inputs), "cpu")
    with torch.no_grad():
        got = call(op, inputs, leaves(op, inputs), "cpu")
    assert torch.equal(got.loss, expected.loss.detach()) and torch.equal(got.logprobs, expected.logprobs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["all_masked", "all_masked_dirty", "all_masked_sequence", "all_masked_grpo"])
@pytest.mark.parametrize("op", ["policy_loss", *FUSED])
def test_all_masked_batch_gives_a_connected_zero(op: str, name: str, backend: str) -> None:
    inputs = build(CASES[name], torch.float32, SOURCES[op])
    leaf = leaves(op, inputs)
    result = call(op, inputs, leaf, backend)
    assert result.loss.item() == 0 and result.loss.requires_grad
    assert all(value.item() == 0 for value in result.metrics.values())
    result.loss.backward()
    assert all(not x.grad.any() for x in leaf.values() if x.grad is not None)
    assert leaf[next(iter(leaf))].grad is not None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("op", "value"), [*((op, math.nan) for op in SOURCES), *((op, math.inf) for op in SOURCES if op != "policy_loss")]
)
def test_nan_in_an_unmasked_row_is_not_swallowed(op: str, value: float, backend: str) -> None:
    inputs = build(CASES["plain"], torch.float32, SOURCES[op])
    tensor = inputs.tensors()[SOURCES[op]]
    tensor[(0, 0, 3)[: tensor.dim()]] = value
    results = run(op, inputs, backend)
    assert not results["loss" if "loss" in results else "logprobs"].isfinite().all()
    assert not results[f"d{SOURCES[op]}"][0, 0].isfinite().all()
    assert results[f"d{SOURCES[op]}"][1:].isfinite().all()


@pytest.mark.parametrize("op", SOURCES)
def test_outputs_beside_the_loss_carry_no_gradient(op: str) -> None:
    inputs = build(CASES["plain"], torch.float32, SOURCES[op])
    result = call(op, inputs, leaves(op, inputs), "cpu")
    carries = {name for name, x in result._asdict().items() if isinstance(x, Tensor) and x.requires_grad}
    assert carries == (
        {"loss"} if "loss" in result._fields else {"logprobs", "entropy", "divergence"} & {*result._fields}
    )


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "torch"])
def test_entropy_alone_has_a_gradient(backend: str) -> None:
    """An upstream gradient that is missing is not one of zeros that somebody forgot."""
    inputs = build(CASES["plain"], torch.float64)
    gradients = []
    for which in ("torch", backend):
        leaf = leaves("token_logprobs", inputs)
        call("token_logprobs", inputs, leaf, which).entropy.sum().backward()
        gradients.append(leaf["logits"].grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].any()


def test_policy_loss_reaches_whatever_made_the_logprobs() -> None:
    weights, advantages = torch.randn(4, 5, requires_grad=True), torch.randn(4)
    loss, _ = policy_loss(-weights.exp(), advantages, torch.ones(4, 5), backend="cpu")
    loss.backward()
    # on-policy, "dapo": -A / 20 a token, through -exp
    torch.testing.assert_close(weights.grad, advantages[:, None] / 20 * weights.detach().exp())


def test_tied_weights_receive_both_gradients() -> None:
    torch.manual_seed(0)
    ids, targets = torch.randint(11, (2, 3)), torch.randint(11, (2, 3))
    gradients = []
    for backend in BACKENDS:
        table = torch.randn(11, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        hidden = torch.nn.functional.embedding(ids, table).tanh()
        out = linear_grpo_loss(hidden, table, targets, torch.tensor([1.0, -1.0]), torch.ones(2, 3), backend=backend)
        out.loss.backward()
        gradients.append(table.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_a_gradient_of_an_unknown_input_is_refused() -> None:
    @named_gradients
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: Tensor, name: str) -> Tensor:  # type: ignore[override]
            ctx.name = name
            return values * 2

        @staticmethod
        def backward(ctx: Any, upstream: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {ctx.name: upstream * 2}

    leaf = torch.ones(2, requires_grad=True)
    Twice.apply(leaf, "values").sum().backward()
    assert leaf.grad is not None and leaf.grad.tolist() == [2, 2]
    with pytest.raises(KeyError, match="value"):
        Twice.apply(leaf, "value").sum().backward()
