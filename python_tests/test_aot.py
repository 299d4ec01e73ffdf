"""Every Triton kernel compiles for GPUs that are not there, and to what the design counts on."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from testing.calls import SOURCES, applies, run  # noqa: E402
from testing.cases import Case  # noqa: E402
from testing.compiled import TARGETS, Launch, launches, loop_instructions, resources  # noqa: E402
from testing.inputs import build  # noqa: E402

from grpo_kernels import GRPOLossConfig, gae, group_advantages  # noqa: E402
from grpo_kernels.ops.linear_token_logprobs import rows  # noqa: E402
from grpo_kernels.ops.token_logprobs import triton_rows  # noqa: E402

EVERYTHING = GRPOLossConfig(beta=0.1, entropy_coef=0.05)
SEQUENCE = GRPOLossConfig(beta=0.1, importance_sampling_level="sequence")
SAPO = GRPOLossConfig(loss_type="sapo", beta=0.1, kl_estimator="abs", kl_clamp=10.0, log_ratio_clamp=20.0)
GMPO = GRPOLossConfig(loss_type="gmpo", beta=0.1, kl_gradient="straight_through", use_bias_correction_kl=False)
EXACT = GRPOLossConfig(beta=0.1, kl_estimator="forward_kl")
BONUS = GRPOLossConfig(entropy_coef=0.05)
#: Vocabularies of models in use, and one of which no row but the first begins at 16 bytes; few rows: nothing runs.
PLAIN = Case("plain", length=3, vocab=151936, hidden=8, old=False, ref=False)
FULL = Case("everything", length=3, vocab=151936, hidden=8, config=EVERYTHING, grad_output=2.0)
CASES = {
    "plain": (PLAIN, torch.bfloat16),
    "full": (FULL, torch.bfloat16),
    "full_fp32": (FULL, torch.float32),
    "full_fp16": (FULL, torch.float16),
    "prime": (Case("prime", length=3, vocab=50257, hidden=8, config=EVERYTHING), torch.bfloat16),
    "large_prime": (Case("large_prime", length=3, vocab=131071, hidden=8, config=EVERYTHING), torch.bfloat16),
    "tiny": (Case("tiny", length=3, vocab=67, hidden=8, ref=False, config=BONUS), torch.bfloat16),
    "small": (Case("small", length=3, vocab=4096, hidden=8, config=EVERYTHING), torch.bfloat16),
    "sequence": (Case("sequence", length=3, vocab=32000, hidden=8, config=SEQUENCE, grad_output=2.0), torch.bfloat16),
    "softcap": (Case("softcap", length=3, vocab=256000, hidden=8, softcap=30.0, config=EVERYTHING), torch.float32),
    "sapo": (Case("sapo", length=3, vocab=32000, hidden=8, config=SAPO), torch.bfloat16),
    "gmpo": (Case("gmpo", length=3, vocab=32000, hidden=8, config=GMPO), torch.bfloat16),
    "rewards": (Case("rewards", length=3, vocab=32000, hidden=8, advantages="rewards"), torch.bfloat16),
    "packed_rewards": (Case("packed", lengths=(1, 2), vocab=32000, hidden=8, advantages="rewards"), torch.bfloat16),
    "negated": (Case("negated", length=3, vocab=32000, hidden=8, logit_scale=-1.0, config=EVERYTHING), torch.bfloat16),
    "compared": (replace(FULL, name="compared", divergence="reverse_kl", config=EXACT), torch.bfloat16),
    "compared_softly": (replace(FULL, name="softly", divergence="js", soft=True, softcap=30.0), torch.float32),
    "strided": (Case("strided", length=3, vocab=32000, hidden=8, layout="strided"), torch.bfloat16),
}
ROW_KERNELS = {"_grpo_loss_kernel", "_token_logprobs_fwd_kernel", "_token_logprobs_bwd_kernel"}
#: Registers of a thread and bytes of shared memory, of any NVIDIA target and of AMD's, when this was written.
RECORDED = {
    "_grpo_loss_kernel": ((160, 8192), (128, 4096)),
    "_token_logprobs_fwd_kernel": ((136, 64), (240, 64)),
    "_token_logprobs_bwd_kernel": ((136, 4096), (96, 2048)),
    "_token_divergence_kernel": ((136, 64), (144, 64)),
    "_policy_loss_kernel": ((184, 64), (80, 64)),
    "_totals_kernel": ((80, 32), (48, 32)),
    "_normalize_kernel": ((64, 32), (40, 32)),
    "_gae_kernel": ((160, 512), (144, 256)),
    "_scale_kernel": ((64, 0), (32, 0)),
    "_hold_ids_kernel": ((40, 1024), (32, 1024)),
}
#: Instructions an element in the loops over a row: statistics, and gradient. An H200 issues 27 in the time that it
#: takes to read and write one bf16 logit (132 multiprocessors x 128 lanes x 1.75 GHz x 4 B / 4.3 TB/s).
BUDGET = {"statistics": 10.0, "gradient": 9.75}


def _calls(case: Case, dtype: torch.dtype) -> None:
    for op, source in SOURCES.items():
        if applies(op, case):
            run(op, build(case, dtype, source), "triton")


def _advantages() -> None:
    for aggregation in ("sum_then_normalize", "normalize_then_sum"):
        group_advantages(torch.ones(4, 2), 2, aggregation=aggregation, backend="triton")
    gae(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3), backend="triton")


@cache
def _launches(name: str, target: str) -> tuple[Launch, ...]:
    return tuple(launches(_advantages if name == "advantages" else lambda: _calls(*CASES[name]), target))


@cache
def _compiled(launch: Launch, target: str) -> Any:
    return launch.compile(TARGETS[target])


@pytest.fixture(autouse=True, scope="module")
def fresh_cache(tmp_path_factory: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", [*CASES, "advantages"])
def test_kernels_compile_without_spills(name: str, target: str) -> None:
    for launch in _launches(name, target):
        taken = resources(_compiled(launch, target))
        registers, shared = RECORDED[launch.name][not target.startswith("sm_")]
        assert taken.spilled == 0, (launch.name, taken)
        assert taken.registers <= registers and taken.shared <= shared, (launch.name, taken)


@pytest.mark.parametrize("target", TARGETS)
def test_what_compiles_is_what_runs_in_an_exact_loss(target: str) -> None:
    names = {launch.name for launch in _launches("compared", target)}
    assert "_token_divergence_kernel" in names and "_policy_loss_kernel" in names


def _row_loops(launch: Launch, target: str) -> list[list[str]]:
    """The innermost loops that read a row."""
    loops = loop_instructions(_compiled(launch, target))
    return [loop for loop in loops if any(instruction.startswith("LDG") for instruction in loop)]


def _is_wide(launch: Launch, loop: list[str]) -> bool:
    """Whether a loop loads and stores 16 bytes a thread; where the gradient is half as wide, 8."""
    store = ".64" if launch.name != "_token_logprobs_fwd_kernel" and launch.constant("IS_NARROWED") else ".128"
    return all({"LDG": ".128", "STG": store}.get(x[:3], "") in x for x in loop)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("name", ["plain", "full_fp32", "full_fp16", "small"])
def test_rows_are_read_and_written_by_16_bytes(name: str, target: str) -> None:
    kernels = [launch for launch in _launches(name, target) if launch.name in ROW_KERNELS]
    assert {launch.name for launch in kernels} == ROW_KERNELS
    for launch in kernels:
        loops = _row_loops(launch, target)
        assert loops and all(_is_wide(launch, loop) for loop in loops), launch.name


def test_rows_that_begin_anywhere_are_read_by_16_bytes_but_for_their_edges() -> None:
    shifted = [
        launch
        for launch in _launches("prime", "sm_90")
        if launch.name in ROW_KERNELS and launch.constant("ALIGNMENT") == triton_rows.Alignment.SHIFTED
    ]
    assert {launch.name for launch in shifted} == ROW_KERNELS
    for launch in shifted:
        wide = [loop for loop in _row_loops(launch, "sm_90") if _is_wide(launch, loop)]
        is_gradient = [any(x.startswith("STG") for x in loop) for loop in wide]
        assert launch.name == "_token_logprobs_bwd_kernel" or not all(is_gradient)
        assert launch.name == "_token_logprobs_fwd_kernel" or any(is_gradient)


def test_rows_are_read_by_16_bytes_on_amd() -> None:
    for launch in _launches("plain", "gfx942"):
        if launch.name in ROW_KERNELS:
            assert "global_load_dwordx4" in _compiled(launch, "gfx942").asm["amdgcn"], launch.name


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("name", ["plain", "full", "full_fp32"])
def test_instructions_an_element_leave_memory_the_bottleneck(name: str, target: str) -> None:
    for launch in _launches(name, target):
        if launch.name in ROW_KERNELS:
            counts = {"gradient": [], "statistics": []}
            for loop in _row_loops(launch, target):
                elements = sum(x.startswith("LDG") for x in loop) * launch.constant("VECTOR")
                is_gradient = any(x.startswith("STG") for x in loop)
                counts["gradient" if is_gradient else "statistics"].append(len(loop) / elements)
            is_fused = launch.name == "_grpo_loss_kernel"
            reads = is_fused or launch.name == "_token_logprobs_fwd_kernel"
            writes = launch.writes("dlogits_ptr") if is_fused else launch.name == "_token_logprobs_bwd_kernel"
            assert (bool(counts["statistics"]), bool(counts["gradient"])) == (reads, writes), (launch.name, counts)
            # of the loops over a row the first, unrolled; the others are its remainder and that of the extra outputs
            assert all(min(found) <= BUDGET[kind] for kind, found in counts.items() if found), (launch.name, counts)


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
        keys.append(set(launches(lambda case=case: _calls(case, torch.bfloat16), "sm_90")))
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
        with mock.patch.object(rows, "is_capturing", lambda device: True):
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
        mock.patch.object(triton_rows, "architecture", lambda device: name),
        mock.patch.object(triton_rows, "processors_of", lambda device: (100, lanes)),
    ):
        for kernel in ("statistics", "gradient", "loss"):
            for vocab in (4096, 32000, 151936):
                blocks = triton_rows.blocks_of(kernel, vocab, 2, torch.device("cpu"))
                _, sizes = blocks.launch(1000, 8, torch.device("cpu"), True)
                assert sizes["LANES"] == lanes * sizes["num_warps"] <= 1024


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_the_tables_programs_fit_together(target: str) -> None:
    with mock.patch.object(triton_rows, "architecture", lambda device: target):
        for kernel in ("statistics", "gradient", "loss"):
            for vocab in (4096, 32000, 65536, 128256, 151936, 262144):
                for itemsize in (2, 4):
                    blocks = triton_rows.blocks_of(kernel, vocab, itemsize, torch.device("cpu"))
                    threads = 32 * blocks.num_warps * math.ceil(blocks.per_processor)
                    assert threads <= 1024 and blocks.num_warps in (1, 2, 4, 8, 16, 32)
