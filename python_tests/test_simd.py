"""Every instruction set's row kernels, on whatever processor has them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from testing.calls import cases_of, run
from testing.cases import FOUND_CASES, INPUT_CASES, VOCABULARY_CASES, Case
from testing.expected import Expected
from testing.inputs import build

from grpo_kernels import backends, token_logprobs

pytestmark = pytest.mark.usefixtures("poison", "one_thread")
LEVELS = ("baseline", "avx2", "avx512")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WIDEST = backends.cpu_simd_level()
CASES = tuple(
    case
    for case in (*INPUT_CASES, VOCABULARY_CASES[0], *FOUND_CASES)
    if case.name.startswith(("vocab", "logits", "softcap", "strided", "next"))
)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    if LEVELS.index(request.param) > LEVELS.index(WIDEST or "baseline"):
        pytest.skip(f"this processor has {WIDEST} at most")
    torch.ops.grpo_kernels.cpu_limit_simd_level(LEVELS.index(request.param))
    yield request.param
    torch.ops.grpo_kernels.cpu_limit_simd_level(LEVELS.index(WIDEST or "baseline"))


def test_the_limit_takes_effect(level: str) -> None:
    assert backends.cpu_simd_level() == level


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(x, marks=() if x in (torch.float32, torch.bfloat16) else pytest.mark.full) for x in DTYPES],
    ids=lambda dtype: str(dtype)[6:],
)
@pytest.mark.parametrize(
    ("op", "case"), [(op, case) for op in ("token_logprobs", "grpo_loss") for case in cases_of(op, CASES)], ids=str
)
def test_level_is_near_the_fp64_baseline(op: str, case: Case, dtype: torch.dtype, level: str) -> None:
    inputs = build(case, dtype)
    Expected.of(op, inputs, dtype).assert_near(run(op, inputs, "cpu"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_logit_is_read_and_written_right(dtype: torch.dtype, level: str) -> None:
    """A gradient of one column alone: with two logits, p - 1 times the upstream gradient, for every value of both."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite() & (values.abs() < 60)]
    logits = torch.stack([values, torch.zeros_like(values)], -1)[None]
    ids = torch.zeros(1, len(values), dtype=torch.int64)
    results = []
    for backend in ("cpu", "torch"):
        leaf = logits.clone().requires_grad_()
        out = token_logprobs(leaf, ids, backend=backend).logprobs
        out.sum().backward()
        results.append((out.detach(), leaf.grad))
    (logprobs, gradient), (expected, expected_gradient) = results
    torch.testing.assert_close(logprobs, expected, rtol=2e-6, atol=1e-7)
    # fp32 values either side of the middle between two neighbours may round to either
    torch.testing.assert_close(gradient, expected_gradient, rtol=2 * torch.finfo(dtype).eps, atol=6e-8)
    assert (gradient == expected_gradient).float().mean() > 0.99


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("count", [1, 3, 8, 31, 32, 100])
def test_gradient_is_scaled_at_every_length(count: int, dtype: torch.dtype, level: str) -> None:
    gradient = torch.randn(3, count, generator=torch.Generator().manual_seed(count)).to(dtype)
    expected = (gradient.to(torch.float64 if dtype == torch.float64 else torch.float32) * 0.3).to(dtype)
    torch.ops.grpo_kernels.scale_cpu(gradient, torch.tensor(0.3, dtype=expected.float().dtype))
    torch.testing.assert_close(gradient, expected, rtol=torch.finfo(dtype).eps, atol=1e-7)
