"""Every op on every backend against fp64, with an error of at most twice that of plain torch in the same dtype."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from functools import cache

import pytest
import torch
from testing.calls import BACKENDS, SOURCES, cases_of, run
from testing.cases import ALL_VARIANT_CASES, FAMILY_CASES, VARIANT_CASES, VOCABULARY_CASES, Case
from testing.emulated import emulated
from testing.expected import Expected
from testing.inputs import build

from grpo_kernels import backends

pytestmark = pytest.mark.usefixtures("poison", "one_thread")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: Triton's kernels run in processes of their own, with its interpreter; the reference is what is compared with.
COMPARED = ("triton",) if "triton" in BACKENDS else ("cpu", "cuda")
#: Other dtypes add conversions alone; these cases cover them.
FEW = ("plain", "vocab_prime", "softcap", "dirty_mask", "strided", "logits_peaked")
#: In `make test`: of every Triton kernel, and of those of a loss. Each case takes another way through the code.
QUICK = (*FEW, "vocab_128256", "temperature", "logits_holes", "logits_offset_cooled", "mask_holes_sequence")
QUICK_LOSSES = (*QUICK, "next_token_layout_sequence", "all_masked", "packed_sequence", "rewards", "loss_scale",
                "grad_output", "bias_sequence", "vespo", "exact_js", "exact_reverse_kl")  # fmt: skip


def is_tested(op: str, backend: str, dtype: torch.dtype, case: Case) -> bool:
    """Whether a case of an op is run at all."""
    few_dtypes = case in (*VARIANT_CASES, *FAMILY_CASES, *VOCABULARY_CASES)
    if backend == "cuda":  # emulated, thread by thread; what it has no kernels of is asked for elsewhere
        if "divergence" in op or case.config.has_exact_divergence or case in VOCABULARY_CASES:
            return False
        return case.name in FEW or (dtype == torch.float32 if few_dtypes else dtype == torch.bfloat16)
    if backend == "triton" and "divergence" in op and dtype != torch.float32:  # two rows take twice as long
        return dtype == torch.bfloat16 and case.name in FEW
    if backend == "triton":  # its interpreter takes half a second a case; fp64 is there to test formulas
        return dtype == torch.float32 or (not few_dtypes and dtype != torch.float64)
    return dtype in (torch.float32, torch.bfloat16) or not few_dtypes


def is_quick(op: str, backend: str, dtype: torch.dtype, case: Case) -> bool:
    """Whether it is part of ``make test``; the rest is left to ``make test-full``."""
    if backend == "cpu":
        return dtype == torch.float32 or case.name in FEW
    if backend == "cuda":
        return False
    if dtype != torch.float32:
        few = {"token_logprobs": FEW, "grpo_loss": FEW, "token_divergence": ("plain", "softcap")}
        return dtype == torch.bfloat16 and case.name in few.get(op, ())
    if op == "policy_loss" and case in (*VARIANT_CASES, *FAMILY_CASES):
        return True
    return case.name in (QUICK_LOSSES if "loss" in op else QUICK)


GRID = [
    pytest.param(
        op, backend, dtype, case, id=f"{op}-{backend}-{str(dtype)[6:]}-{case}",
        marks=() if is_quick(op, backend, dtype, case) else pytest.mark.full,
    )
    for op in SOURCES
    for case in cases_of(op)
    for dtype in DTYPES
    for backend in COMPARED
    if is_tested(op, backend, dtype, case)
]  # fmt: skip
assert set(QUICK_LOSSES) <= {case.name for case in cases_of("grpo_loss") + cases_of("linear_grpo_loss")}


@cache
def _expected(op: str, dtype: torch.dtype, case: Case, rounds_dlogits: bool) -> Expected:
    return Expected.of(op, build(case, dtype, SOURCES[op]), dtype, rounds_dlogits)


@pytest.mark.parametrize(("op", "backend", "dtype", "case"), GRID)
def test_op_is_near_its_fp64_baseline(op: str, backend: str, dtype: torch.dtype, case: Case) -> None:
    with emulated() if backend == "cuda" and backends.cuda_architectures() == () else nullcontext():
        reason = backends.unsupported_reason(op, backend, torch.device("cpu"))
        if reason is not None:
            pytest.skip(reason)
        # GEMMs in half precision take gradients in half precision; the C++ backend widens instead
        rounds_dlogits = backend in ("triton", "cuda") and dtype in (torch.bfloat16, torch.float16)
        expected = _expected(op, dtype, case, rounds_dlogits)
        before = expected.inputs.clone().tensors()
        results = run(op, expected.inputs, backend)
    expected.assert_near(results)
    for name, tensor in expected.inputs.tensors().items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num()), f"{name} was changed"


@pytest.mark.parametrize(
    ("op", "case"),
    [(op, case) for op in SOURCES for case in cases_of(op) if case.name in ("dirty_mask", "packed_dirty", "bias")],
    ids=str,
)
def test_the_reference_leaves_its_inputs_alone(op: str, case: Case) -> None:
    inputs = build(case, torch.float32, SOURCES[op])
    before = inputs.clone().tensors()
    run(op, inputs, "torch")
    assert all(torch.equal(x.nan_to_num(), before[name].nan_to_num()) for name, x in inputs.tensors().items())


def test_a_case_is_left_out_for_one_that_stays() -> None:
    cases = {case.name: case for case in cases_of("linear_grpo_loss")}
    bias = (cases["bias"], cases["bias_sequence"])
    assert cases_of("linear_grpo_loss", bias) == bias
    assert cases_of("linear_token_logprobs", bias) == bias[:1]
    assert cases_of("linear_token_logprobs", bias[1:]) == bias[1:]


def test_variants_have_every_pair_of_options() -> None:
    def pairs(cases: tuple[Case, ...]) -> set:
        return {pair for case in cases for pair in itertools.combinations(enumerate(case.name.split("-")), 2)}

    assert pairs(VARIANT_CASES) == pairs(ALL_VARIANT_CASES) and len(VARIANT_CASES) == 12


@pytest.mark.parametrize("op", backends.OPS)
def test_the_compiled_backend_is_present(op: str) -> None:
    assert backends.unsupported_reason(op, "cpu", torch.device("cpu")) is None
    assert backends.resolve(op, "auto", torch.device("cpu")) == "cpu"
