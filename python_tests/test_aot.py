"""Every Triton kernel compiles for GPUs that are not there, and to what the design counts on."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from testing.calls import run  # noqa: E402
from testing.cases import Case  # noqa: E402
from testing.compiled import TARGETS, Launch, launches, resources  # noqa: E402
from testing.inputs import build  # noqa: E402
from triton_resources import (  # noqa: E402
    CASES,
    COUNTED,
    OTHERS,
    ROW_KERNELS,
    bounds,
    calls,
    compiled,
    instructions_a_logit,
    kernel_of,
    launches_of,
    recorded,
    row_loops,
)

from grpo_kernels import GRPOLossConfig  # noqa: E402
from grpo_kernels.ops.head import selection  # noqa: E402
from grpo_kernels.ops.rows.triton import launch as row_launch  # noqa: E402

NVIDIA = [target for target in TARGETS if target.startswith("sm_")]
#: Instructions a logit that no record may pass. An H200 issues 27 in the time that it takes to read and write one bf16
#: logit (132 multiprocessors x 128 lanes x 1.75 GHz x 4 B / 4.3 TB/s).
BUDGET = {"statistics": 9.8, "gradient": 9.9}
#: Bytes of a thread that ptxas of a release keeps in memory, read once a row: 1024 threads have 64 registers each. On
#: AMD registers, beside the 128 that 1024 threads have, of fp32 logits with a softcap.
SPILLED = {("3.9.0", "_grpo_loss_kernel", "sm"): 8, ("3.9.0", "_grpo_loss_kernel", "gfx942"): 23}


@pytest.fixture(autouse=True, scope="module")
def fresh_cache(tmp_path_factory: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


#: In `make test` these are compiled, for sm_90: between them they launch every kernel.
QUICK = ("plain", "full", "prime", "sequence", "softcap", "sapo", "rewards", "compared", OTHERS)
assert {*CASES, OTHERS} >= set(QUICK)


def for_targets(names: Iterable[str], targets: Iterable[str]) -> pytest.MarkDecorator:
    """Every case for every GPU; what `make test` does not compile is left to `make test-full`."""
    rows = itertools.product(names, targets)
    return pytest.mark.parametrize(
        ("name", "target"),
        [pytest.param(*row, marks=() if row[1] == "sm_90" and row[0] in QUICK else pytest.mark.full) for row in rows],
    )


@for_targets([*CASES, OTHERS], TARGETS)
def test_kernels_take_no_more_than_is_recorded(name: str, target: str) -> None:
    for launch in launches_of(name, target):
        taken, most = resources(compiled(launch, target)), bounds()[kernel_of(launch)][target]
        assert taken.registers <= most.registers and taken.shared <= most.shared, (kernel_of(launch), taken, most)
        assert taken.spilled <= most.spilled, (kernel_of(launch), taken, most)


def test_every_kernel_is_compiled_in_make_test() -> None:
    quick = {launch.name for name in QUICK for launch in launches_of(name, "sm_90")}
    assert quick == {kernel.split()[0] for kernel in recorded()["3.7.1"]}


def test_what_is_recorded_leaves_memory_the_bottleneck() -> None:
    table = recorded()
    assert {"3.6.0", "3.7.1", "3.9.0"} <= table.keys()
    for release, kernels in table.items():
        assert kernels.keys() == table["3.7.1"].keys(), release
        for kernel, targets in kernels.items():
            assert targets.keys() == TARGETS.keys(), (release, kernel)
            for target, usage in targets.items():
                where = (release, kernel, target, usage)
                spilled = SPILLED.get((release, kernel.split()[0], target.split("_")[0]), 0)
                assert usage.spilled <= spilled, where
                assert all((getattr(usage, kind) or 0) <= most for kind, most in BUDGET.items()), where


def test_an_unknown_release_is_held_to_the_most_that_is_recorded() -> None:
    with mock.patch.object(triton, "__version__", "99.0.0"):
        most = bounds.__wrapped__()
    for kernels in recorded().values():
        for kernel, targets in kernels.items():
            assert all(usage.registers <= most[kernel][target].registers for target, usage in targets.items()), kernel


@pytest.mark.parametrize("target", TARGETS)
def test_what_compiles_is_what_runs_in_an_exact_loss(target: str) -> None:
    names = {launch.name for launch in launches_of("compared", target)}
    assert "_token_divergence_kernel" in names and "_policy_loss_kernel" in names


def _is_wide(launch: Launch, loop: list[str]) -> bool:
    """Whether a loop loads and stores 16 bytes a thread; where the gradient is half as wide, 8."""
    types = dict(launch.signature)
    is_narrower = types["logits_ptr"] == "*fp32" and types.get("dlogits_ptr") in ("*bf16", "*fp16")
    store = ".64" if is_narrower else ".128"
    return all({"LDG": ".128", "STG": store}.get(x[:3], "") in x for x in loop)


@for_targets(["plain", "full_fp32", "full_fp16", "full_rewards", "small"], NVIDIA)
def test_rows_are_read_and_written_by_16_bytes(name: str, target: str) -> None:
    kernels = [launch for launch in launches_of(name, target) if launch.name in ROW_KERNELS]
    assert {launch.name for launch in kernels} == ROW_KERNELS
    for launch in kernels:
        loops = row_loops(launch, target)
        assert loops and all(_is_wide(launch, loop) for loop in loops), launch.name


def test_rows_that_begin_anywhere_are_read_by_16_bytes_but_for_their_edges() -> None:
    shifted = [
        launch
        for launch in launches_of("prime", "sm_90")
        if launch.name in ROW_KERNELS and launch.constant("ALIGNMENT") == row_launch.Alignment.SHIFTED
    ]
    assert {launch.name for launch in shifted} == ROW_KERNELS
    for launch in shifted:
        wide = [loop for loop in row_loops(launch, "sm_90") if _is_wide(launch, loop)]
        is_gradient = [any(x.startswith("STG") for x in loop) for loop in wide]
        assert launch.name == "_token_logprobs_bwd_kernel" or not all(is_gradient)
        assert launch.name == "_token_logprobs_fwd_kernel" or any(is_gradient)


@pytest.mark.parametrize("target", [pytest.param(x, marks=() if x == "sm_90" else pytest.mark.full) for x in NVIDIA])
def test_rows_that_begin_anywhere_and_lie_differently_are_taken_element_by_element(target: str) -> None:
    """Wide loads and stores of them would trap on a GPU."""
    exact = GRPOLossConfig(beta=0.1, kl_estimator="forward_kl")
    case = Case("loose", vocab=4099, hidden=8, divergence="js", layout="strided", config=exact)
    found = [launch for launch in launches(lambda: calls(case, torch.bfloat16), target) if "ALIGNMENT" in
             dict(launch.signature) and launch.constant("ALIGNMENT") == row_launch.Alignment.LOOSE]  # fmt: skip
    assert {launch.name for launch in found} >= {"_token_divergence_kernel", "_token_logprobs_bwd_kernel"}
    for launch in found:
        loops = row_loops(launch, target)
        wide = [x for loop in loops for x in loop if x.startswith(("LDG", "STG")) and (".64" in x or ".128" in x)]
        assert loops and not wide, (launch.name, wide)


def test_rows_are_read_by_16_bytes_on_amd() -> None:
    for launch in launches_of("plain", "gfx942"):
        if launch.name in ROW_KERNELS:
            assert "global_load_dwordx4" in compiled(launch, "gfx942").asm["amdgcn"], launch.name


@for_targets(["plain", "full", "full_fp32", "full_rewards", "prime", "compared"], NVIDIA)
def test_threads_go_over_a_row_without_waiting_for_each_other_or_for_their_own_memory(name: str, target: str) -> None:
    """A block's layout keeps UNROLL within a thread, whatever the release of Triton."""
    kernels = [launch for launch in launches_of(name, target) if "ALIGNMENT" in dict(launch.signature)]
    assert {launch.name for launch in kernels} > ROW_KERNELS - {"_grpo_loss_kernel"}
    for launch in kernels:
        for loop in row_loops(launch, target):
            assert not [x for x in loop if x.startswith(("SHFL", "STS", "LDS", "STL", "LDL"))], launch.name


@for_targets(COUNTED, NVIDIA)
def test_instructions_a_logit_are_no_more_than_recorded(name: str, target: str) -> None:
    for launch in launches_of(name, target):
        if launch.name in ROW_KERNELS:
            counts, most = instructions_a_logit(launch, target), bounds()[kernel_of(launch)][target]
            is_fused = launch.name == "_grpo_loss_kernel"
            reads = is_fused or launch.name == "_token_logprobs_fwd_kernel"
            writes = launch.writes("dlogits_ptr") if is_fused else launch.name == "_token_logprobs_bwd_kernel"
            assert ("statistics" in counts, "gradient" in counts) == (reads, writes), (launch.name, counts)
            assert all(round(n, 2) <= getattr(most, kind) for kind, n in counts.items()), (launch.name, counts, most)


@pytest.mark.parametrize("target", [pytest.param(x, marks=() if x == "sm_90" else pytest.mark.full) for x in TARGETS])
def test_advantages_from_rewards_cost_rows_nothing(target: str) -> None:
    """As many threads, no register in memory, as many instructions; a load of 8 logits has one to spare."""
    given, made = (
        {kernel_of(launch): launch for launch in launches_of(name, target) if launch.name == "_grpo_loss_kernel"}
        for name in ("full", "full_rewards")
    )
    name = "_grpo_loss_kernel bf16 bf16"
    assert made[name].writes("rewards_ptr") and made[name].options == given[name].options
    taken, least = (resources(compiled(x[name], target)) for x in (made, given))
    most = dict(made[name].options).get("maxnreg", least.registers)
    assert taken.registers <= most and taken.spilled <= least.spilled, (taken, least)
    if target in NVIDIA:
        counts, least_counts = (instructions_a_logit(x[name], target) for x in (made, given))
        assert all(counts[kind] <= n + 1 / 8 for kind, n in least_counts.items()), (counts, least_counts)


def test_a_new_length_or_value_compiles_nothing() -> None:
    """No length, count of completions, stride or hyper-parameter is part of what a kernel is compiled for."""
    changes = [
        {"batch": 2, "length": 3, "config": GRPOLossConfig(beta=0.1, temperature=1.0, epsilon_low=0.2, delta=2.0)},
        {"batch": 16, "length": 16, "config": GRPOLossConfig(beta=0.2, temperature=0.7, epsilon_low=0.1, delta=3.0)},
        {"batch": 1, "length": 1, "config": GRPOLossConfig(beta=1.0, temperature=2.0, epsilon_low=0.0, delta=1.0)},
    ]
    keys = []
    for change in changes:
        case = Case("any", vocab=4096, hidden=8, divergence="reverse_kl", **change)
        keys.append(set(launches(lambda case=case: calls(case, torch.bfloat16), "sm_90")))
    assert keys[0] == keys[1] == keys[2]


def test_a_new_share_of_dead_rows_compiles_nothing() -> None:
    """Nor does capturing a CUDA graph, where none leaves."""
    case = Case("dead", batch=24, length=1, vocab=4096, hidden=8, mask="ones", ref=False)
    for op in ("linear_grpo_loss", "linear_token_logprobs"):
        inputs = build(case, torch.bfloat16, "hidden")
        keys = []
        for live in (1, 3, 4, 8, 16):
            some = torch.arange(24) < live
            given = replace(
                inputs, advantages=some.float(), dlogprobs=some[:, None].float(), dentropy=torch.zeros(24, 1)
            )
            keys.append(set(launches(lambda given=given, op=op: run(op, given, "triton"), "sm_90")))
        with mock.patch.object(selection, "is_capturing", lambda device: True):
            keys.append(set(launches(lambda given=given, op=op: run(op, given, "triton"), "sm_90")))
        assert all(key <= keys[0] for key in keys), op


@pytest.mark.parametrize("op", ["grpo_loss", "token_logprobs"])
def test_a_batch_past_2_to_the_31_elements_compiles_nothing(op: str) -> None:
    inputs = build(Case("far", batch=1, length=3, vocab=4096, hidden=8, mask="ones"), torch.bfloat16)
    far = replace(inputs, logits=inputs.logits.as_strided((1, 3, 4096), (2**31 + 4096, 4096, 1)))
    near, past = (set(launches(lambda x=x: run(op, x, "triton"), "sm_90")) for x in (inputs, far))
    assert near == past


@pytest.mark.parametrize(("name", "lanes"), [("any", 64), ("gfx942", 64), ("any", 32)])
def test_no_program_has_more_threads_than_a_gpu_takes(name: str, lanes: int) -> None:
    with (
        mock.patch.object(row_launch, "architecture", lambda device: name),
        mock.patch.object(row_launch, "processors_of", lambda device: (100, lanes)),
    ):
        for kernel in ("statistics", "gradient", "loss"):
            for vocab in (4096, 32000, 151936):
                blocks = row_launch.blocks_of(kernel, vocab, 2, torch.device("cpu"))
                _, sizes = blocks.launch(1000, 8, torch.device("cpu"), True)
                assert sizes["LANES"] == lanes * sizes["num_warps"] <= 1024


def test_the_tables_rows_say_whether_they_were_measured() -> None:
    rows = json.loads(row_launch.TABLE.read_text())["blocks"]
    assert {row["source"] for row in rows} <= {"rule", "measured"}


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_the_tables_programs_fit_together(target: str) -> None:
    with mock.patch.object(row_launch, "architecture", lambda device: target):
        for kernel in ("statistics", "gradient", "loss"):
            for vocab in (4096, 32000, 65536, 128256, 151936, 262144):
                for itemsize in (2, 4):
                    blocks = row_launch.blocks_of(kernel, vocab, itemsize, torch.device("cpu"))
                    threads = 32 * blocks.num_warps * math.ceil(blocks.per_processor)
                    assert threads <= 1024 and blocks.num_warps in (1, 2, 4, 8, 16, 32)
