"""Every op on every backend against fp64, with an error of at most twice that of plain torch in the same dtype."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import pytest
import torch
from testing.calls import SOURCES, applies, run
from testing.cases import ALL_CASES, FAMILY_CASES, VARIANT_CASES, VOCABULARY_CASES, Case
from testing.emulated import emulated
from testing.expected import Expected
from testing.inputs import build

from grpo_kernels import registry

pytestmark = pytest.mark.usefixtures("poison", "one_thread")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_tested(op: str, backend: str, dtype: torch.dtype, case: Case) -> bool:
    if not applies(op, case):
        return False
    few_dtypes = case in (*VARIANT_CASES, *FAMILY_CASES, *VOCABULARY_CASES)
    if backend == "cuda":  # emulated, thread by thread; what it has no kernels of is asked for elsewhere
        if "divergence" in op or case.config.has_exact_divergence or case in VOCABULARY_CASES:
            return False
        return case.name in FEW or (dtype == torch.float32 if few_dtypes else dtype == torch.bfloat16)
    # the torch backend in fp64 is the baseline itself, and in half precision fp32 between two roundings
    if backend == "torch":
        return dtype == torch.float32 and not few_dtypes
    if backend == "triton" and "divergence" in op and dtype != torch.float32:  # two rows take twice as long
        return dtype == torch.bfloat16 and case.name in FEW
    if backend == "triton":  # its interpreter takes half a second a case; fp64 is there to test formulas
        return dtype == torch.float32 or (not few_dtypes and dtype != torch.float64)
    return dtype in (torch.float32, torch.bfloat16) or not few_dtypes


#: What fp16 adds to bf16 under the interpreter, where a case takes half a second: conversions, and these say enough.
FEW = ("plain", "vocab_prime", "softcap", "dirty_mask", "strided", "logits_peaked")


def _marks(backend: str, dtype: torch.dtype, case: Case) -> list[pytest.MarkDecorator]:
    return [pytest.mark.full] if backend == "triton" and dtype == torch.float16 and case.name not in FEW else []


GRID = [
    pytest.param(
        op, backend, dtype, case, id=f"{op}-{backend}-{str(dtype)[6:]}-{case}", marks=_marks(backend, dtype, case)
    )
    for op in SOURCES
    for case in ALL_CASES
    for dtype in DTYPES
    for backend in registry.BACKENDS
    if is_tested(op, backend, dtype, case)
]


@cache
def _expected(op: str, dtype: torch.dtype, case: Case, rounds_dlogits: bool) -> Expected:
    return Expected.of(op, build(case, dtype, SOURCES[op]), dtype, rounds_dlogits)


@pytest.mark.parametrize(("op", "backend", "dtype", "case"), GRID)
def test_op_is_near_its_fp64_baseline(op: str, backend: str, dtype: torch.dtype, case: Case) -> None:
    with emulated() if backend == "cuda" and registry.cuda_architectures() == () else nullcontext():
        reason = registry.unsupported_reason(op, backend, torch.device("cpu"))
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


@pytest.mark.parametrize("op", registry.OPS)
def test_the_compiled_backend_is_present(op: str) -> None:
    assert registry.unsupported_reason(op, "cpu", torch.device("cpu")) is None
    assert registry.resolve(op, "auto", torch.device("cpu")) == "cpu"
