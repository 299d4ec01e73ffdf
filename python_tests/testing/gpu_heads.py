"""A head on the CPU as it is on a GPU: GEMMs that write fp32 from half precision, rows of 128 bytes, two memories."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from grpo_kernels import GRPOLossConfig
from grpo_kernels.ops.head import gemm, memory, reference_model, sources
from grpo_kernels.ops.head.gemm import row_width
from grpo_kernels.ops.head.memory import MemoryPlan, RowBytes
from testing.calls import rounded_dlogits, run
from testing.cases import FAMILY_CASES, INPUT_CASES, LOSS_CASES, Case
from testing.inputs import build

_HALF = (torch.float16, torch.bfloat16)


@dataclass
class Gemms:
    """The GEMMs of half-precision inputs in order: rows, inner and columns, the dtype written, whether it was added."""

    calls: list[tuple[int, int, int, torch.dtype, bool]] = field(default_factory=list)

    def note(self, a: Tensor, b: Tensor, out: Tensor, adds: bool) -> None:
        self.calls.append((a.shape[0], a.shape[1], b.shape[1], out.dtype, adds))


def gpu_row_width(vocab: int, dtype: torch.dtype, device: torch.device) -> int:
    """``row_width`` as it is on a GPU, whatever the device."""
    return row_width(vocab, dtype, torch.device("cuda"))


@contextmanager
def gpu_gemms(workspace_rows: int = 512, multiple: int = 128) -> Iterator[Gemms]:
    """Within it heads run so; a workspace beside a buffer has at most ``workspace_rows`` rows.

    Args:
        workspace_rows: The default's rows.
        multiple: What the rows of chunks and buffers are multiples of, where they can be.
    """
    done = Gemms()
    real = {"mm": torch.mm, "addmm": torch.addmm}
    memory_of: dict[str, Tensor] = {}  # kept, so that from the second pass on a GEMM allocates nothing

    def held(name: str, shape: tuple[int, ...]) -> Tensor:
        size = math.prod(shape)
        if name not in memory_of or memory_of[name].numel() < size:
            memory_of[name] = torch.empty(size)
        return memory_of[name][:size].view(shape)

    def multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        assert a.dtype == b.dtype in _HALF
        assert all(1 in x.stride() for x in (a, b, out)), "a GEMM would copy a tensor without a dense dimension"
        wide = (held(name, x.shape).copy_(x) for name, x in (("a", a), ("b", b)))
        return real["mm"](*wide, out=held("product", out.shape))

    def mm(a: Tensor, b: Tensor, *, out: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
        if a.dtype not in _HALF or out is None:
            return real["mm"](a, b) if out is None else real["mm"](a, b, out=out)
        assert out.dtype == (out_dtype or a.dtype)
        done.note(a, b, out, False)
        return out.copy_(multiply(a, b, out))

    def addmm(self: Tensor, a: Tensor, b: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        assert self is out and out.dtype == out_dtype == torch.float32, "in place: nothing is copied first"
        done.note(a, b, out, True)
        return out.add_(multiply(a, b, out))

    with ExitStack() as stack:
        for target, name, value in (
            (gemm, "writes_fp32", lambda device: True),
            (memory, "WORKSPACE_ROWS", workspace_rows),
            (gemm.Head, "row_multiple", multiple),
            (torch, "mm", mm),
            (torch, "addmm", addmm),
            *((module, "row_width", gpu_row_width) for module in (gemm, sources, reference_model)),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        yield done


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most bytes that were allocated at once within a call, beyond those before it, on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = most = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    del result
    return most


_CLIPPED = Case("clipped", batch=4, ref=False, config=GRPOLossConfig(epsilon_low=0.01))
CASES = {case.name: case for case in (_CLIPPED, *INPUT_CASES, *LOSS_CASES, *FAMILY_CASES)}
#: An op and a case by name; masked, dead and clipped rows among them, and exact divergences.
GPU_HEADS = [
    *((op, name) for op in ("linear_token_logprobs", "linear_grpo_loss")
      for name in ("plain", "dirty_mask", "some_advantages", "packed_sequence", "bias", "transform_all")),
    *(("linear_grpo_loss", name) for name in ("clipped", "exact_js", "exact-sequence", "zero_advantage")),
]  # fmt: skip


def assert_gpu_head_conforms(op: str, case: Case, backend: str) -> None:
    """In one buffer of gradients, in two or three, row by row, and with saved logits."""
    inputs = build(case, torch.float16, "hidden")
    with rounded_dlogits(torch.float16):
        expected = run(op, inputs, "torch")
    vocab, hidden = inputs.weight.shape
    sums, logits_row, gradient_row = vocab * hidden * 4, -(-vocab // 32) * 128, -(-vocab // 64) * 128
    logits_row *= 2 if case.config.has_exact_divergence else 1
    rows = inputs.ids.numel() // 2
    bounds = (None, sums + 2 * logits_row + rows * gradient_row, sums + logits_row + gradient_row)
    saved = {"max_logits_bytes": rows * logits_row}
    for options in (*({"workspace_bytes": bound} for bound in bounds), saved, {**saved, "workspace_bytes": bounds[1]}):
        with gpu_gemms(workspace_rows=2, multiple=2):
            got = run(op, inputs, backend, **options)
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            message = functools.partial("{}, {}: {}".format, options, name)
            torch.testing.assert_close(got[name], value, rtol=4e-3, atol=2e-4, msg=message)


def planned_bytes(plan: MemoryPlan, sizes: RowBytes, rows: int, live_rows: int) -> int:
    """What a pass allocates beside its inputs and results: workspace, buffer, and sums over several buffers."""
    buffers = [
        block[-1].stop - block[0].start
        for block in plan.blocks(rows, live_rows, [(0, rows)])
        if block[0].start < live_rows
    ]
    workspace = min(plan.chunk_rows, rows) * sizes.logits
    return workspace + max(buffers, default=0) * sizes.gradient + (sizes.accumulator if len(buffers) > 1 else 0)
