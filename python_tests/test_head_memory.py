"""The memory of a head: how a bound divides it, what is then allocated, and which GEMMs and row ops that takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from testing.calls import call as run_call
from testing.calls import leaves
from testing.cases import Case
from testing.emulated import emulated
from testing.gpu_heads import CASES, GPU_HEADS, assert_gpu_head_conforms, gpu_gemms, peak_bytes, planned_bytes
from testing.inputs import build
from torch import Tensor

from grpo_kernels import linear_token_logprobs
from grpo_kernels.ops.head import gemm
from grpo_kernels.ops.head import inputs as head_inputs
from grpo_kernels.ops.head import memory as head_memory
from grpo_kernels.ops.head.buffers import HeadGradients, NeededGradients
from grpo_kernels.ops.head.driver import Chunk, HeadPass, RowResults
from grpo_kernels.ops.head.gemm import Head
from grpo_kernels.ops.head.inputs import HeadOptions
from grpo_kernels.ops.head.memory import MemoryPlan, RowBytes
from grpo_kernels.ops.head.selection import SelectedRows, pack_live

HALF, SINGLE = torch.bfloat16, torch.float32
ALL, DX_ONLY = NeededGradients(True, True, False), NeededGradients(True, False, False)
NOTHING = NeededGradients(False, False, False)


def _head(vocab: int, hidden: int, logits_dtype: torch.dtype = SINGLE, device: str = "cpu") -> Head:
    generator = torch.Generator().manual_seed(1)
    weight = torch.empty(vocab, hidden, device=device, dtype=HALF)
    weight = weight if device == "meta" else torch.randn(vocab, hidden, generator=generator).to(HALF)
    return Head(weight, None, HALF, logits_dtype, HALF)


@pytest.mark.parametrize(
    ("live", "rows", "hidden", "vocab", "buffers", "total"),
    [
        (8192, 8192, 4096, 128256, [8192], 2.364e9),
        (8191, 8191, 4096, 128256, [8191], 2.364e9),
        (8000, 8192, 4096, 128257, [8000], 2.316e9),
        (1000, 1024, 4096, 128256, [1000], 0.519e9),
        (64, 64, 4096, 128256, [64], 0.0493e9),
        (8192, 8192, 896, 151936, [4096, 4096], 2.10e9),  # and fp32 sums beside them
        (131071, 131072, 4096, 128256, [12032] * 10 + [10751], 5.45e9),
    ],
)
def test_the_default_on_a_gpu_is_512_rows_of_logits_and_as_few_buffers_as_may_be(
    live: int, rows: int, hidden: int, vocab: int, buffers: list[int], total: float
) -> None:
    with gpu_gemms():
        head = _head(vocab, hidden, device="meta")
        plan = MemoryPlan.of(head, ALL, rows, live, None)
        blocks = list(plan.blocks(rows, live, [(0, rows)]))
        assert [block[-1].stop - block[0].start for block in blocks if block[0].start < live] == buffers
        assert max(chunk.stop - chunk.start for block in blocks for chunk in block) == min(512, rows)
        assert planned_bytes(plan, RowBytes.of(head, ALL), rows, live) == pytest.approx(total, rel=0.01)
        assert MemoryPlan.of(head, NOTHING, rows, live, None).chunk_rows == 512


def test_bf16_logits_and_their_gradients_are_one_memory() -> None:
    with gpu_gemms():
        head = _head(128256, 4096, HALF, device="meta")
        for live, rows, buffers in ((8191, 8191, [8191]), (8000, 8192, [8000]), (100, 8192, [100])):
            plan = MemoryPlan.of(head, ALL, rows, live, None)
            blocks = [block for block in plan.blocks(rows, live, [(0, rows)]) if block[0].start < live]
            assert [min(chunk.stop, live) - chunk.start for (chunk,) in blocks] == buffers


ROWS, HIDDEN, VOCAB = 37, 16, 71
GRADIENT_ROW, LOGITS_ROW, SUMS = 256, 384, VOCAB * HIDDEN * 4  # bytes; rows are padded to 128
#: Bounds, the rows of a chunk and of each buffer that they leave. Sums of fp32 are only needed for several buffers.
BUDGETS = [
    (None, 4, [37]),
    (4 * LOGITS_ROW + ROWS * GRADIENT_ROW, 4, [37]),
    (LOGITS_ROW + ROWS * GRADIENT_ROW, 4, [13, 13, 11]),  # cheaper than one buffer filled row by row
    (SUMS + 4 * LOGITS_ROW + 12 * GRADIENT_ROW, 4, [12, 12, 12, 1]),
    (SUMS + 2 * LOGITS_ROW + 6 * GRADIENT_ROW, 2, [6] * 6 + [1]),
    (SUMS + LOGITS_ROW + GRADIENT_ROW, 1, [1] * 37),
]


@dataclass
class Rows:
    """A row op in torch: log-probs ``[N]`` and their gradients times ``c``; rows whose ``c`` is 0 are written as 0."""

    ids: Tensor
    c: Tensor
    tells_live: bool = False
    chunks: list[Chunk] = field(default_factory=list)

    def __call__(self, chunk: Chunk) -> RowResults:
        self.chunks.append(chunk)
        c, at = self.c[chunk.rows], self.ids[chunk.rows, None]
        logprobs = chunk.logits.float().log_softmax(-1)
        if chunk.dlogits is not None:
            chunk.dlogits.copy_(c[:, None] * (torch.zeros_like(logprobs).scatter_(1, at, 1.0) - logprobs.exp()))
        return RowResults((logprobs.gather(-1, at)[:, 0],), (c != 0) if self.tells_live else None)


def _hidden() -> Tensor:
    return torch.randn(ROWS, HIDDEN, generator=torch.Generator().manual_seed(2)).to(HALF)


def _run(bound: int | None, row_op: Any, needs: NeededGradients = ALL, live: int = ROWS) -> tuple[Tensor, ...]:
    hidden = _hidden()
    rows, options = SelectedRows(None, live, ROWS, ROWS, hidden.device), HeadOptions(HALF, SINGLE, bound)
    head_pass = HeadPass("torch", _head(VOCAB, HIDDEN), hidden, rows, needs, options)
    (logprobs,), gradients = head_pass.run(row_op, (SINGLE,))
    return logprobs, *gradients


def _assert_right(found: tuple[Tensor, ...], rows: Rows) -> None:
    """Against fp64, from gradients of logits that are rounded to bf16 once; ``dX`` and ``dW`` are rounded once too."""
    hidden, weight = _hidden().double(), _head(VOCAB, HIDDEN).parameter.double()
    logprobs = (hidden @ weight.t()).log_softmax(-1)
    at = rows.ids[:, None]
    dlogits = rows.c[:, None].double() * (torch.zeros_like(logprobs).scatter_(1, at, 1.0) - logprobs.exp())
    torch.testing.assert_close(found[0].double(), logprobs.gather(-1, at)[:, 0], rtol=1e-5, atol=1e-5)
    for got, (a, b) in zip(found[1:3], ((dlogits, weight), (dlogits.t(), hidden)), strict=True):
        if got.numel():
            once = 2.0**-8 * (a.abs() @ b.abs()) + 2.0**-8 * (a @ b).abs()
            assert ((got.double() - a @ b).abs() <= once).all()


@pytest.mark.parametrize(("bound", "chunk", "buffers"), BUDGETS)
def test_gemms_and_row_ops_are_those_of_the_plan(bound: int | None, chunk: int, buffers: list[int]) -> None:
    rows = Rows(torch.arange(ROWS), torch.linspace(-1, 1, ROWS))
    with gpu_gemms(workspace_rows=4, multiple=4) as done:
        found = _run(bound, rows)
    projected, dweight, dhidden = ([call for call in done.calls if call[i] == VOCAB] for i in (2, 0, 1))
    assert [call[0] for call in projected] == [c.logits.shape[0] for c in rows.chunks]
    assert max(call[0] for call in projected) == chunk and len(projected) == sum(-(-size // chunk) for size in buffers)
    written = SINGLE if len(buffers) > 1 else HALF
    assert [call[1:] for call in dweight] == [(size, HIDDEN, written, n > 0) for n, size in enumerate(buffers)]
    assert [(call[0], call[3]) for call in dhidden] == [(size, SINGLE) for size in buffers]
    assert len(done.calls) == len(projected) + len(dweight) + len(dhidden)
    _assert_right(found, rows)


@pytest.mark.parametrize(("bound", "chunk", "buffers"), BUDGETS)
def test_the_peak_is_that_of_the_plan(bound: int | None, chunk: int, buffers: list[int]) -> None:
    values = torch.zeros(ROWS)

    def copy(chunk: Chunk) -> RowResults:
        chunk.dlogits.copy_(chunk.logits)
        return RowResults((values[chunk.rows],))

    memory = chunk * LOGITS_ROW + max(buffers) * GRADIENT_ROW + (SUMS if len(buffers) > 1 else 0)
    assert bound is None or memory <= bound
    results = (ROWS * HIDDEN + VOCAB * HIDDEN) * 2
    with gpu_gemms(workspace_rows=4, multiple=4):
        _run(bound, copy)
        peak = peak_bytes(lambda: _run(bound, copy))
    inputs = ROWS * HIDDEN * (2 + 4) + VOCAB * HIDDEN * (2 + 4)  # made within the call, fp32 and rounded
    assert memory + results <= peak <= memory + results + inputs


def test_dhidden_takes_no_memory_beside_the_workspace() -> None:
    rows, size = 2000, 4
    hidden, values = torch.randn(rows, size).to(HALF), torch.zeros(rows)

    def copy(chunk: Chunk) -> RowResults:
        chunk.dlogits.copy_(chunk.logits)
        return RowResults((values[chunk.rows],))

    def run() -> object:
        every, options = SelectedRows(None, rows, rows, rows, hidden.device), HeadOptions(HALF, SINGLE, None)
        return HeadPass("torch", _head(VOCAB, size), hidden, every, DX_ONLY, options).run(copy, (SINGLE,))

    with gpu_gemms():
        run()
        peak = peak_bytes(run)
    sums, head, logprobs = rows * size * 4, VOCAB * size * (4 + 2), rows * 4
    assert peak < 512 * LOGITS_ROW + rows * GRADIENT_ROW + rows * size * 2 + head + logprobs + sums / 2


@pytest.mark.parametrize("bound", [bound for bound, _, _ in BUDGETS])
def test_rows_known_to_be_dead_never_enter_the_buffer(bound: int | None) -> None:
    rows = Rows(torch.arange(ROWS), (torch.arange(ROWS) < 9).float())
    with gpu_gemms(workspace_rows=4, multiple=4) as done:
        found = _run(bound, rows, live=9)
    assert sum(call[1] for call in done.calls if call[0] == VOCAB) == 9
    assert [chunk.dlogits is None for chunk in rows.chunks] == [chunk.rows.start >= 9 for chunk in rows.chunks]
    _assert_right(found, rows)


@pytest.mark.parametrize(("dead", "multiplied"), [(4, 37), (5, 32), (37, 0)])
def test_rows_that_die_are_packed_from_an_eighth_on(dead: int, multiplied: int) -> None:
    """By this call's own count: the same before and after another call, bit for bit."""
    rows = Rows(torch.arange(ROWS), torch.ones(ROWS), tells_live=True)
    rows.c[torch.randperm(ROWS, generator=torch.Generator().manual_seed(3))[:dead]] = 0
    other = Rows(torch.arange(ROWS), torch.zeros(ROWS).index_fill_(0, torch.arange(3), 1.0), tells_live=True)
    with gpu_gemms(workspace_rows=4, multiple=4) as done:
        found = _run(None, rows)
        assert sum(call[1] for call in done.calls if call[0] == VOCAB) == multiplied
        _run(None, other)
        again = _run(None, rows)
    assert all(map(torch.equal, found, again))
    _assert_right(found, rows)


def test_dhidden_is_summed_in_the_workspace_some_rows_at_a_time() -> None:
    head, rows = _head(VOCAB, HIDDEN), 300
    dlogits = torch.randn(rows, VOCAB).to(HALF)
    for tokens in (slice(0, rows), torch.randperm(rows)):
        with gpu_gemms() as done:
            made = HeadGradients(head, torch.empty(rows, HIDDEN, dtype=HALF), DX_ONLY, 1)
            made.add(dlogits, torch.empty(0), tokens, scratch=torch.empty(130, HIDDEN))
        assert [call[0] for call in done.calls] == [130, 130, 40]
        expected = (dlogits.float() @ head.parameter.float()).to(HALF)
        assert torch.equal(made.results()[0][tokens], expected)


@pytest.mark.parametrize(("scratch_bytes", "moves"), [(None, 8), (VOCAB * 2, 37), (VOCAB * 2 * 7 + 2, 6), (1, 8)])
def test_rows_are_packed_through_scratch_memory(scratch_bytes: int | None, moves: int) -> None:
    values = torch.randn(60, 96).to(HALF)[:, :VOCAB]
    live = torch.zeros(60, dtype=torch.bool)
    live[torch.randperm(60)[:37]] = True
    expected = values[live].clone()
    scratch = None if scratch_bytes is None else torch.empty(scratch_bytes, dtype=torch.uint8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        packed, index = pack_live("cpu", values, live, scratch)
    assert torch.equal(packed, expected) and torch.equal(live.nonzero()[:, 0], index)
    assert sum(event.name == "aten::index_select" for event in profiler.events()) == moves


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("is_in_place", [False, True])
@pytest.mark.parametrize("needs", [ALL, DX_ONLY, NOTHING], ids=["all", "dhidden", "nothing"])
def test_a_plan_keeps_to_its_bound_and_the_least_is_told(
    needs: NeededGradients, is_in_place: bool, multiple: int
) -> None:
    with gpu_gemms(workspace_rows=8, multiple=multiple):
        head = _head(VOCAB, HIDDEN, HALF if is_in_place else SINGLE)
        sizes = RowBytes.of(head, needs)
        for rows in (1, 2, 37):
            least = sizes.least(rows)
            hidden = torch.empty(rows, HIDDEN, dtype=HALF).requires_grad_(needs.need_dhidden)
            tensors = (head.parameter.detach().requires_grad_(needs.need_dweight), None, hidden)
            options = HeadOptions(HALF, head.logits_dtype, least - 1)
            message = f"workspace_bytes must be None or at least {least} here, got {least - 1}"
            with pytest.raises(ValueError, match=message):
                options.check_bound("triton", *tensors)
            for bound in (*range(least, least + 12000, 97), 10**6):
                HeadOptions(HALF, head.logits_dtype, bound).check_bound("triton", *tensors)
                for live in range(rows + 1 if needs.any else 1):
                    plan = MemoryPlan.of(head, needs, rows, live, bound)
                    assert planned_bytes(plan, sizes, rows, live) <= bound, (rows, live, bound)


def test_more_memory_moves_no_more_bytes() -> None:
    """Of the head's weight, read once a chunk, and of its fp32 sums, read and written once a buffer."""
    with gpu_gemms():
        head, rows, before = _head(128256, 4096, device="meta"), 8192, float("inf")
        for bound in range(2_110_000_000, 5_000_000_000, 3_000_000):
            blocks = list(MemoryPlan.of(head, ALL, rows, rows, bound).blocks(rows, rows, [(0, rows)]))
            moved = 2 * sum(map(len, blocks)) + 8 * (len(blocks) - 1)
            assert moved <= before * 1.1, bound
            before = min(before, moved)


def test_nothing_to_project_needs_no_memory() -> None:
    for backend in ("cpu", "torch"):
        hidden, head, ids = torch.zeros(0, 3, 4), torch.zeros(5, 4), torch.zeros(0, 3, dtype=torch.long)
        assert linear_token_logprobs(hidden, head, ids, workspace_bytes=1, backend=backend).logprobs.shape == (0, 3)


@pytest.mark.parametrize("saved", [None, 0, 8, 64])
def test_saved_logits_leave_the_bound_as_it_is(saved: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rows were saved and others were not there are two buffers, whose sums of a bf16 weight count."""
    monkeypatch.setattr(gemm, "_ROUNDED_BYTES", 1 << 12)
    vocab, size, rows = 1024, 32, 64
    bound = rows * vocab * 4
    hidden, weight = (torch.randn(n, size).to(HALF).requires_grad_() for n in (rows, vocab))
    max_logits_bytes = None if saved is None else saved * vocab * 4
    logprobs = linear_token_logprobs(
        hidden, weight, torch.arange(rows), backend="cpu", workspace_bytes=bound, max_logits_bytes=max_logits_bytes
    ).logprobs
    peak = peak_bytes(lambda: torch.autograd.grad(logprobs, (hidden, weight), torch.ones(rows)))
    results, widened = (vocab + rows) * size * 2, (vocab + rows) * size * 4
    assert peak <= bound + results + widened + 2 * rows * size * 4 + (1 << 13)


def test_a_default_that_not_all_logits_fit_holds_in_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of it for saved logits, half for a workspace; the sums of a bf16 weight lie beside it, in the backward."""
    vocab, size, rows, default = 1024, 32, 36, 16 * 1024 * 4
    for module in (head_inputs, head_memory):
        monkeypatch.setattr(module, "CPU_WORKSPACE_BYTES", default)
    monkeypatch.setattr(head_inputs, "WORKSPACE_ROWS", 3)
    hidden, weight = (torch.randn(n, size).to(HALF).requires_grad_() for n in (rows, vocab))
    results, widened = (vocab + rows) * size * 2, (vocab + rows) * size * 4
    found: list[Tensor] = []
    forward = peak_bytes(
        lambda: found.append(linear_token_logprobs(hidden, weight, torch.arange(rows), backend="cpu").logprobs)
    )
    saved = [x for x in found[0].grad_fn.saved_tensors if x is not None and x.shape[-1:] == (vocab,)]
    assert [x.nbytes for x in saved] == [default // 2] and forward <= default + widened + (1 << 13)
    backward = peak_bytes(lambda: torch.autograd.grad(found[0], (hidden, weight), torch.ones(rows)))
    assert backward <= default // 2 + vocab * size * 4 + results + widened + 2 * rows * size * 4 + (1 << 13)


@pytest.mark.parametrize("call", ["linear_token_logprobs", "linear_grpo_loss", "linear_token_divergence"])
def test_a_bound_too_small_is_refused_before_any_work(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = build(Case("refused", divergence="js", advantages="rewards", ref=False), SINGLE, "hidden")
    leaf = leaves(call, inputs)
    monkeypatch.setattr("grpo_kernels.ops.head.linear_grpo_loss.group_advantages", None)
    monkeypatch.setattr("grpo_kernels.ops.head.gemm.matmul", None)
    with pytest.raises(ValueError, match=r"workspace_bytes must be None or at least \d+ here, got 1"):
        run_call(call, inputs, leaf, "cpu", workspace_bytes=1)


@pytest.mark.full
@pytest.mark.parametrize(("op", "name"), [pair for pair in GPU_HEADS if not CASES[pair[1]].config.has_exact_divergence])
def test_emulated_heads_of_a_gpu(op: str, name: str, poison: None, one_thread: None) -> None:
    with emulated():
        assert_gpu_head_conforms(op, CASES[name], "cuda")
