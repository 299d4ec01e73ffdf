"""The linear ops: which GEMMs they spend, in how much memory, and that neither changes a result."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from testing.calls import call, cases_of, leaves, run
from testing.cases import FAMILY_CASES, INPUT_CASES, LOSS_CASES, Case
from testing.inputs import build
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from grpo_kernels import GRPOLossConfig, grpo_loss, linear_grpo_loss, linear_token_logprobs
from grpo_kernels.ops.head.buffers import NeededGradients
from grpo_kernels.ops.head.gemm import Head
from grpo_kernels.ops.head.inputs import HeadOptions

CASES = {case.name: case for case in (*INPUT_CASES, *LOSS_CASES, *FAMILY_CASES)}
LINEAR = ("linear_token_logprobs", "linear_grpo_loss")
BATCH, LENGTH, HIDDEN, VOCAB = 4, 6, 16, 96
_GEMMS = ("aten::mm", "aten::addmm", "aten::addmm_")


def _profiled(function: Callable[[], Any]) -> list[Any]:
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as profiler:
        function()
    return list(profiler.events())


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _gemm_rows(function: Callable[[], Any]) -> float:
    """Multiply-adds of all GEMMs, in units of one token through the head; by one thread, for which no row is added."""
    total = 0
    with _threads(1):
        events = _profiled(function)
    for event in events:
        if event.name in _GEMMS:
            first = 1 if "addmm" in event.name else 0
            a, b = event.input_shapes[first : first + 2]
            total += a[0] * a[1] * b[1]
    return total / (HIDDEN * VOCAB)


def _largest_allocation(function: Callable[[], Any]) -> int:
    return max(event.self_cpu_memory_usage for event in _profiled(function))


def _tensors(**changes: Any) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(BATCH, LENGTH, HIDDEN, generator=rng).requires_grad_(),
        "lm_head_weight": torch.randn(VOCAB, HIDDEN, generator=rng).requires_grad_(),
        "completion_ids": torch.randint(VOCAB, (BATCH, LENGTH), generator=rng),
        "advantages": torch.tensor([1.0, -1.0, 0.5, 2.0]),
        "completion_mask": torch.ones(BATCH, LENGTH),
        **changes,
    }


def _step(config: GRPOLossConfig | None = None, **changes: Any) -> float:
    arguments = _tensors(**changes)

    def step() -> None:
        loss = linear_grpo_loss(**arguments, config=config or GRPOLossConfig(), backend="cpu").loss
        if loss.requires_grad:
            loss.backward()

    return _gemm_rows(step)


ROWS = BATCH * LENGTH


def test_a_step_spends_three_gemms_a_row() -> None:
    assert _step() == 3 * ROWS


def test_masked_rows_are_not_projected() -> None:
    mask = torch.ones(BATCH, LENGTH)
    mask[:, 4:] = 0
    assert _step(completion_mask=mask) == 3 * (ROWS - 2 * BATCH)


def test_rows_of_zero_advantage_cost_one_gemm() -> None:
    advantages = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert _step(advantages=advantages) == ROWS + 2 * LENGTH
    assert _step(advantages=torch.zeros(BATCH)) == ROWS


def test_rows_of_zero_advantage_live_by_kl_and_entropy() -> None:
    zero = torch.zeros(BATCH)
    reference = torch.full((BATCH, LENGTH), -3.0)
    assert _step(GRPOLossConfig(beta=0.1), advantages=zero, ref_logprobs=reference) == 3 * ROWS
    assert _step(GRPOLossConfig(entropy_coef=0.1), advantages=zero) == 3 * ROWS


def test_rows_of_zero_rollout_weight_cost_one_gemm() -> None:
    weights = torch.tensor([[1.0], [0.0], [0.0], [1.0]])
    assert _step(rollout_is_weights=weights) == ROWS + 2 * 2 * LENGTH


def test_clipped_rows_cost_one_gemm() -> None:
    tensors = _tensors()
    logprobs = linear_token_logprobs(
        tensors["hidden_states"].detach(), tensors["lm_head_weight"].detach(), tensors["completion_ids"]
    ).logprobs
    old = logprobs - math.log(1.5)  # above the range: clipped where the advantage is positive
    assert _step(old_logprobs=old) == ROWS + 2 * LENGTH


def test_few_clipped_rows_are_not_worth_moving_the_others() -> None:
    tensors = _tensors()
    detached = [tensors[name].detach() for name in ("hidden_states", "lm_head_weight", "completion_ids")]
    old = linear_token_logprobs(*detached).logprobs
    old[0, :2] -= math.log(1.5)  # clipped: 2 of 24
    assert _step(old_logprobs=old) == 3 * ROWS
    old[0] -= math.log(1.5)  # 6 of 24
    assert _step(old_logprobs=old) == 3 * ROWS - 2 * LENGTH


def test_a_frozen_head_costs_no_weight_gradient() -> None:
    head = _tensors()["lm_head_weight"].detach()
    assert _step(lm_head_weight=head) == 2 * ROWS


def test_frozen_hidden_states_cost_no_gradient() -> None:
    hidden = _tensors()["hidden_states"].detach()
    assert _step(hidden_states=hidden) == 2 * ROWS


def test_no_grad_costs_the_forward() -> None:
    with torch.no_grad():
        assert _step() == ROWS
    frozen = {name: _tensors()[name].detach() for name in ("hidden_states", "lm_head_weight")}
    assert _step(**frozen) == ROWS


def _logprob_step(upstream: Tensor, freeze_head: bool = False, **options: Any) -> float:
    tensors = _tensors()
    head = tensors["lm_head_weight"].detach() if freeze_head else tensors["lm_head_weight"]

    def step() -> None:
        out = linear_token_logprobs(
            tensors["hidden_states"], head, tensors["completion_ids"], backend="cpu", **options
        ).logprobs
        (out * upstream).sum().backward()

    return _gemm_rows(step)


@pytest.mark.parametrize("live", [0, 2, LENGTH])
def test_logprob_rows_without_upstream_gradient_cost_one_gemm(live: int) -> None:
    upstream = torch.zeros(BATCH, LENGTH)
    upstream[:, :live] = 1
    assert _logprob_step(upstream) == ROWS + 2 * BATCH * live  # the workspace keeps the logits
    assert _logprob_step(upstream, max_logits_bytes=0) == ROWS + 3 * BATCH * live
    assert _logprob_step(upstream, freeze_head=True, save_projection=False) == ROWS + BATCH * live
    frozen = {"freeze_head": True, "save_projection": False, "max_logits_bytes": 0}
    assert _logprob_step(upstream, **frozen) == ROWS + 2 * BATCH * live


@pytest.mark.parametrize("live", [0, 2, LENGTH])
def test_a_frozen_head_projects_back_in_the_forward(live: int) -> None:
    upstream = torch.zeros(BATCH, LENGTH)
    upstream[:, :live] = 1
    assert _logprob_step(upstream, freeze_head=True) == 2 * ROWS
    assert _logprob_step(upstream, freeze_head=True, max_logits_bytes=1 << 30) == ROWS + BATCH * live
    with torch.no_grad():
        tensors = _tensors()
        del tensors["advantages"], tensors["completion_mask"]
        assert _gemm_rows(lambda: linear_token_logprobs(*tensors.values(), backend="cpu")) == ROWS


@pytest.mark.parametrize("name", ["plain", "dirty_mask", "bias", "all_masked", "transform_all"])
@pytest.mark.parametrize("wanted", [("logprobs",), ("entropy",), ("logprobs", "entropy")], ids=str)
def test_a_frozen_head_changes_no_gradient(name: str, wanted: tuple[str, ...]) -> None:
    inputs = build(CASES[name], torch.float64, "hidden")

    def gradient(backend: str, **options: Any) -> Tensor:
        leaf = leaves("linear_token_logprobs", inputs)
        frozen = {**leaf, **{name: x.detach() for name, x in leaf.items() if name != "hidden"}}
        out = call("linear_token_logprobs", inputs, frozen, backend, **options)
        upstream = {"logprobs": inputs.dlogprobs, "entropy": inputs.dentropy}
        torch.autograd.backward([getattr(out, x) for x in wanted], [upstream[x].double() for x in wanted])
        return leaf["hidden"].grad

    expected = gradient("torch")
    for options in ({}, {"save_projection": False}, {"workspace_bytes": 3 * ROW}):
        torch.testing.assert_close(gradient("cpu", **options), expected, rtol=1e-9, atol=1e-12)


def test_retained_logits_are_not_projected_again() -> None:
    upstream, row = torch.ones(BATCH, LENGTH), VOCAB * 4
    assert _logprob_step(upstream, max_logits_bytes=ROWS * row) == 3 * ROWS
    assert _logprob_step(upstream, max_logits_bytes=10 * row + 1) == 4 * ROWS - 10
    upstream[0] = 0
    assert _logprob_step(upstream, max_logits_bytes=10 * row) == ROWS + 3 * (ROWS - LENGTH) - (10 - LENGTH)


def test_a_workspace_that_holds_no_call_keeps_logits_in_one_half(monkeypatch: pytest.MonkeyPatch) -> None:
    upstream, row = torch.ones(BATCH, LENGTH), VOCAB * 4
    assert _logprob_step(upstream, workspace_bytes=ROWS * row) == 3 * ROWS
    assert _logprob_step(upstream, workspace_bytes=12 * row) == 4 * ROWS  # chunks of 6 rows would be slower
    monkeypatch.setattr("grpo_kernels.ops.head.inputs.WORKSPACE_ROWS", 6)
    assert _logprob_step(upstream, workspace_bytes=12 * row) == 4 * ROWS - 6
    assert _logprob_step(upstream, workspace_bytes=11 * row) == 4 * ROWS


def test_a_traced_graph_overwrites_nothing_so_it_saves_logits_in_one_half(monkeypatch: pytest.MonkeyPatch) -> None:
    head = Head.of("cpu", torch.empty(VOCAB, HIDDEN), None, torch.float32, torch.float32)
    options = HeadOptions(torch.float32, torch.float32, 12 * head.row_bytes)
    needs = NeededGradients(True, True, False)

    def saved(*rows: int) -> list[int]:
        return [options.with_saved_logits(head, needs, count)[1] // head.row_bytes for count in rows]

    assert saved(5, 6, 12, 13) == [12, 12, 12, 0]
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    assert saved(5, 6, 7) == [6, 6, 0]


@pytest.mark.parametrize("live", [slice(None), slice(2, 5), slice(0, 6, 2)], ids=["all", "contiguous", "apart"])
def test_a_second_backward_projects_what_the_first_overwrote(live: slice) -> None:
    tensors = _tensors()
    leaf = [tensors[name] for name in ("hidden_states", "lm_head_weight")]
    upstream = torch.zeros(BATCH, LENGTH)
    upstream[:, live] = torch.randn(BATCH, LENGTH)[:, live]

    def gradients(backend: str) -> list[list[Tensor]]:
        out = linear_token_logprobs(*leaf, tensors["completion_ids"], backend=backend).logprobs
        return [list(torch.autograd.grad(out, leaf, upstream, retain_graph=True)) for _ in range(3)]

    expected = gradients("torch")[0]
    for found in gradients("cpu"):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_sequence_level_drops_dead_rows() -> None:
    config = GRPOLossConfig(importance_sampling_level="sequence")
    advantages = torch.tensor([1.0, 0.0, 0.0, 0.0])
    off_policy = {"old_logprobs": torch.full((BATCH, LENGTH), -4.0)}
    assert _step(config, advantages=advantages, **off_policy) == ROWS + 2 * LENGTH
    assert _step(config, advantages=advantages) == ROWS + 2 * LENGTH  # on-policy: nothing to wait for


ROW = 37 * 8  # bytes of the cases' logits in fp64
OPTIONS = (
    {"workspace_bytes": 2 * ROW},
    {"workspace_bytes": 3 * ROW},
    {"workspace_bytes": 11 * ROW},
    {"max_logits_bytes": 0},
    {"max_logits_bytes": 3 * ROW},
    {"max_logits_bytes": 7 * ROW, "workspace_bytes": 2 * ROW},
    {"max_logits_bytes": 1 << 30},
)
MEMORY_CASES = ("plain", "dirty_mask", "dirty_mask_sequence", "bias", "bias_sequence", "packed_sequence", "all_masked",
                "exact_js", "exact-sequence", "some_advantages", "zero_advantage", "strided")  # fmt: skip
#: Log-probs are the same whatever the loss is.
MEMORY = [(op, case.name) for op in LINEAR for case in cases_of(op, tuple(CASES[name] for name in MEMORY_CASES))]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("op", "name"), MEMORY)
def test_bounds_on_memory_change_no_result(op: str, name: str, options: dict[str, int], poison: None) -> None:
    inputs = build(CASES[name], torch.float64, "hidden")
    expected, got = run(op, inputs, "cpu"), run(op, inputs, "cpu", **options)
    assert expected.keys() == got.keys()
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-12, atol=1e-13, msg=lambda m, key=key: f"{key}: {m}")


_SYNCS = ("aten::nonzero", "aten::item", "aten::_local_scalar_dense", "aten::masked_select")


@pytest.mark.parametrize(
    ("op", "name"), [*MEMORY, ("linear_grpo_loss", "on_policy"), ("linear_grpo_loss", "zero_advantage_kl")]
)
def test_nothing_is_read_back_while_a_graph_is_captured(
    op: str, name: str, monkeypatch: pytest.MonkeyPatch, poison: None
) -> None:
    """Then every row is taken, masked ones as zeros, and the results are the same."""
    inputs = build(CASES[name], torch.float64, "hidden")
    # checks of values, which run on a CPU alone, read back too
    monkeypatch.setattr("grpo_kernels.validation.may_read", lambda tensor, debug: False)
    expected = run(op, inputs, "cpu")
    for module in ("selection", "sources", "live_rows"):
        monkeypatch.setattr(f"grpo_kernels.ops.head.{module}.is_capturing", lambda device: True)
    made = torch.tensor

    def made_on_the_host(data: Any, *arguments: Any, **options: Any) -> torch.Tensor:
        assert "device" not in options, "on a GPU it waits for the copy"
        return made(data, *arguments, **options)

    monkeypatch.setattr(torch, "tensor", made_on_the_host)
    for options in ({}, {"workspace_bytes": 3 * ROW}, {"max_logits_bytes": 7 * ROW}):
        got = run(op, inputs, "cpu", **options)
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, rtol=1e-12, atol=1e-13, msg=lambda m, key=key: f"{key}: {m}")
    events = {event.name for event in _profiled(lambda: run(op, inputs, "cpu"))}
    assert not events.intersection(_SYNCS)


def test_retained_logits_stay_within_their_bound() -> None:
    tensors = _tensors()
    out = linear_token_logprobs(
        tensors["hidden_states"], tensors["lm_head_weight"], tensors["completion_ids"], max_logits_bytes=5000,
        workspace_bytes=2000, backend="cpu",
    )  # fmt: skip
    saved = [x for x in out.logprobs.grad_fn.saved_tensors if x is not None and x.shape[-1:] == (VOCAB,)]
    assert [x.nbytes for x in saved] == [5000 // (4 * VOCAB) * 4 * VOCAB]


def test_logits_never_exist_as_a_whole() -> None:
    case = Case("wide", batch=4, length=16, vocab=4000, hidden=4)
    inputs = build(case, torch.float32, "hidden")
    bound = case.vocab * 4 * 8  # 8 rows of 64
    for op in LINEAR:
        assert _largest_allocation(lambda op=op: run(op, inputs, "cpu", workspace_bytes=bound)) <= bound


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_an_in_place_step_allocates_next_to_nothing(level: str) -> None:
    config = GRPOLossConfig(importance_sampling_level=level)
    inputs = build(Case("wide", batch=4, length=16, vocab=4000, ref=False, config=config), torch.float32)
    leaf = leaves("grpo_loss", inputs)
    events = _profiled(lambda: call("grpo_loss", inputs, leaf, "cpu", inplace=True).loss.backward())
    total = sum(max(event.self_cpu_memory_usage, 0) for event in events)
    assert total < 0.02 * inputs.logits.nbytes


def test_no_grad_allocates_no_gradient() -> None:
    inputs = build(Case("wide", batch=4, length=16, vocab=4000), torch.float32)
    with torch.no_grad():
        largest = _largest_allocation(lambda: call("grpo_loss", inputs, leaves("grpo_loss", inputs), "cpu"))
    assert largest < 0.01 * inputs.logits.nbytes


def test_from_hidden_states_as_from_logits() -> None:
    inputs = build(CASES["plain"], torch.float64, "hidden")
    logits = inputs.hidden @ inputs.weight.mT
    arguments: dict[str, Any] = {"old_logprobs": inputs.old, "ref_logprobs": inputs.ref, "config": inputs.case.config}
    rest = (inputs.ids, inputs.advantages, inputs.mask)
    a = grpo_loss(logits, *rest, **arguments)
    b = linear_grpo_loss(inputs.hidden, inputs.weight, *rest, **arguments)
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-12, atol=0)
