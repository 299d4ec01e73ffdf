"""Registered ops are what their schemas and fakes say; public functions trace whole, once for all lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from testing.calls import BACKENDS, SOURCES, call, cases_of, leaves, run
from testing.cases import FAMILY_CASES, INPUT_CASES, LOSS_CASES, Case
from testing.inputs import Inputs, build
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import grpo_kernels
from grpo_kernels import GRPOLossConfig, gae, group_advantages
from grpo_kernels.ops.registration import KERNEL_BACKENDS

CASES = {case.name: case for case in (*INPUT_CASES, *LOSS_CASES, *FAMILY_CASES)}
#: One of each way through the code; the first ones in `make test`.
QUICK = ("packed_sequence", "exact_js", "dirty_mask")
TRACED = (*QUICK, "bias_sequence", "next_token_layout", "packed_token_advantages", "rewards", "num_items_tensor",
          "exact-sequence")  # fmt: skip


class _Recorder(TorchDispatchMode):
    """Keeps the arguments of our own ops, as they were before the call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "grpo_kernels":
            self.calls.append((func, tuple(x.clone() if isinstance(x, Tensor) else x for x in args)))
        return func(*args, **(kwargs or {}))


def _recorded_calls(backend: str) -> dict[str, tuple[Any, tuple]]:
    """Arguments with which the public functions call each registered op, for a few cases."""
    names = ("plain", "bias_sequence", "dirty_mask", "next_token_layout", "packed_sequence", "grad_output",
             "exact_reverse_kl")  # fmt: skip
    calls = {}
    for op in SOURCES:
        for case in cases_of(op, tuple(CASES[name] for name in names)):
            # saved logits of rows that are masked are not written, so that two runs may differ there
            options = {"max_logits_bytes": 0} if op.startswith("linear_") and "divergence" not in op else {}
            with _Recorder() as recorder:
                run(op, build(case, torch.float32, SOURCES[op]), backend, **options)
            calls |= {f"{func._opname}-{op}-{case}": (func, args) for func, args in recorder.calls}
    unmasked = build(Case("unmasked", mask="ones"), torch.float32, "hidden")
    with _Recorder() as recorder:
        run("linear_token_logprobs", unmasked, backend)
    calls |= {f"{func._opname}-saved": (func, args) for func, args in recorder.calls}
    with _Recorder() as recorder:
        group_advantages(torch.tensor([[1.0], [2.0], [4.0], [8.0]]), 2, backend=backend)
        gae(torch.ones(2, 3), torch.ones(2, 3), torch.tensor([[1, 1, 1], [1, 0, 1]]), backend=backend)
    calls |= {f"{func._opname}-{func._opname}": (func, args) for func, args in recorder.calls}
    return calls


COMPILED_BACKENDS = tuple(backend for backend in KERNEL_BACKENDS if backend in BACKENDS)
RECORDED = {name: call for backend in COMPILED_BACKENDS for name, call in _recorded_calls(backend).items()}


OPS = [func._opname for func, _ in RECORDED.values()]


@pytest.mark.parametrize(
    "name",
    [  # in `make test` each op once
        pytest.param(name, marks=pytest.mark.full if op in OPS[:n] else ())
        for n, (name, op) in enumerate(zip(RECORDED, OPS, strict=True))
    ],
)
def test_opcheck(name: str) -> None:
    func, args = RECORDED[name]
    torch.library.opcheck(func, args)


def test_opcheck_covers_every_registered_op() -> None:
    defined = {
        schema.name.split("::")[1]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("grpo_kernels::") and schema.name.endswith(COMPILED_BACKENDS)
    }
    assert defined == {func._opname for func, _ in RECORDED.values()}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _loss(op: str, inputs: Inputs, leaf: dict[str, Tensor], backend: str, **options: Any) -> Tensor:
    result = call(op, inputs, leaf, backend, **options)
    if "loss" in result._fields:
        return result.loss + 0 * result.metrics["entropy"]
    upstream = (inputs.dlogprobs.nan_to_num(0, 0, 0), inputs.dentropy.nan_to_num(0, 0, 0))
    loss = (result.logprobs * upstream[0]).sum() + (result.entropy * upstream[1]).sum()
    if "divergence" in result._fields:
        loss = loss + (result.divergence * inputs.ddivergence.nan_to_num(0, 0, 0)).sum()
    return loss


def _gradients(function: Callable[..., Tensor], op: str, inputs: Inputs, **options: Any) -> list[Tensor]:
    leaf = leaves(op, inputs)
    loss = function(op, inputs, {name: x * 1.0 for name, x in leaf.items()}, "cpu", **options)
    (inputs.case.grad_output * loss).backward()
    return [loss.detach(), *(x.grad for x in leaf.values() if x.grad is not None)]


@pytest.mark.parametrize(
    ("op", "name"),
    [
        pytest.param(op, case.name, marks=() if case.name in QUICK else pytest.mark.full)
        for op in SOURCES
        for case in cases_of(op, tuple(CASES[name] for name in TRACED))
    ],
)
def test_public_function_traces_whole(op: str, name: str) -> None:
    inputs = build(CASES[name], torch.float32, SOURCES[op])
    compiled = torch.compile(_loss, fullgraph=True, backend="aot_eager", dynamic=False)
    expected, got = _gradients(_loss, op, inputs), _gradients(compiled, op, inputs)
    assert len(expected) == len(got) > 1
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("op", "name", "options"),
    [
        ("token_logprobs", "plain", {"inplace_backward": True}),
        ("grpo_loss", "plain", {"inplace": True}),
        ("grpo_loss", "strided_sequence", {"inplace": True}),
        ("linear_token_logprobs", "plain", {"max_logits_bytes": 400, "workspace_bytes": 500}),
        ("linear_grpo_loss", "bias", {"workspace_bytes": 500, "logits_dtype": torch.float32}),
        ("linear_grpo_loss", "bias_sequence", {"max_logits_bytes": 400, "workspace_bytes": 500}),
    ],
)
def test_options_trace_whole(op: str, name: str, options: dict[str, Any]) -> None:
    inputs = build(CASES[name], torch.float32, SOURCES[op])
    compiled = torch.compile(_loss, fullgraph=True, backend="aot_eager", dynamic=False)
    for a, b in zip(_gradients(_loss, op, inputs), _gradients(compiled, op, inputs, **options), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


LEVELS = [*((op, "token") for op in SOURCES), ("grpo_loss", "sequence"), ("linear_grpo_loss", "sequence")]
LEFT_OUT = [("linear_token_divergence", "token"), ("grpo_loss", "sequence")]  # of `make test`


@pytest.mark.parametrize(
    ("op", "level"), [pytest.param(*row, marks=pytest.mark.full if row in LEFT_OUT else ()) for row in LEVELS]
)
def test_a_new_length_compiles_nothing(op: str, level: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_loss, fullgraph=True, backend=counter)
    config = GRPOLossConfig(beta=0.1, entropy_coef=0.05, importance_sampling_level=level)
    counts = []
    for length in (5, 7, 16, 33):
        inputs = build(Case(f"length_{length}", length=length, config=config), torch.float32, SOURCES[op])
        for a, b in zip(_gradients(_loss, op, inputs), _gradients(compiled, op, inputs), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-7)
        counts.append(counter.frame_count)
    assert counts == [1, 2, 2, 2]  # once for the first length, once for any


def test_group_advantages_traces_whole() -> None:
    rewards = torch.tensor([1.0, 2.0, 4.0, torch.nan])
    compiled = torch.compile(lambda r: group_advantages(r, 2), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(rewards), group_advantages(rewards, 2))


def test_gae_traces_whole() -> None:
    inputs = torch.arange(6.0).view(2, 3), torch.ones(2, 3), torch.tensor([[1, 1, 1], [1, 0, 1]])
    compiled = torch.compile(gae, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs).advantages, gae(*inputs).advantages)


def test_module_traces_whole() -> None:
    inputs = build(CASES["plain"], torch.float32)
    module = grpo_kernels.GRPOLoss(CASES["plain"].config)
    arguments = (inputs.logits, inputs.ids, inputs.advantages, inputs.mask)
    options = {"old_logprobs": inputs.old, "ref_logprobs": inputs.ref}
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments, **options).loss, module(*arguments, **options).loss)


def test_a_config_may_be_made_in_what_is_traced() -> None:
    """And is by the loss itself, of sequences' ratios that are all 1."""
    logits, ids, mask = torch.randn(2, 3, 8, requires_grad=True), torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3)

    def loss_of(logits: Tensor) -> Tensor:
        config = GRPOLossConfig(importance_sampling_level="sequence")
        return grpo_kernels.grpo_loss(logits, ids, torch.tensor([1.0, -1.0]), mask, config=config, backend="cpu").loss

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits), loss_of(logits))


def test_a_fresh_config_compiles_nothing() -> None:
    """What a config derives from its fields is there before the trace, which would see it appear and compile again."""
    logits, ids, mask = torch.randn(2, 3, 8, requires_grad=True), torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3)

    def loss_of(logits: Tensor, config: GRPOLossConfig) -> Tensor:
        return grpo_kernels.grpo_loss(logits, ids, torch.tensor([1.0, -1.0]), mask, config=config, backend="cpu").loss

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss_of, fullgraph=True, backend=counter)
    config = GRPOLossConfig(loss_type="vespo")
    for each in (config, config, GRPOLossConfig(loss_type="vespo")):
        compiled(logits, each).backward()
    assert counter.frame_count == 1
