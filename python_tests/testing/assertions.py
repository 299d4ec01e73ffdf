"""Errors measured against an fp64 baseline, and bounded by those of plain torch in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor

#: Added to twice the reference's own error, per unit of the largest value (at least 1): about 8 ulp of the type that
#: the arithmetic is in, for where the reference happens to round to the exact value. Arithmetic on half-precision
#: inputs is fp32, and what rounding its results costs is in the reference's error. fp64 is there to test formulas:
#: two ulp of a logit of 1e4, the baseline being rounded as well.
ATOL = {torch.float64: 4e-12, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
#: The same for the error of a whole tensor, in the Euclidean norm relative to the tensor's: a small systematic error,
#: under the bound at every element, fails here.
RTOL = ATOL
#: Per element: what 1 - p loses where p is near 1, in the type that sums begin in: half an ulp below 1; in fp64 a few.
_FLOOR = {torch.float64: 4e-15, torch.float32: 3e-8, torch.bfloat16: 3e-8, torch.float16: 3e-8}
_FEWEST = 8  # elements of which a norm says more than the largest error does


def assert_near_baseline(
    results: dict[str, Tensor],
    references: dict[str, Tensor],
    baselines: dict[str, Tensor],
    dtype: torch.dtype,
    reference_baselines: dict[str, Tensor] | None = None,
) -> None:
    """Asserts that results have the names, shapes and dtypes of the references, and hardly more than their error.

    With y64 the baseline, ``max|y - y64| <= 2 max|reference - y64| + atol``, and the same in the relative 2-norm.

    Args:
        results: Of the implementation under test, by name.
        references: Of plain torch, on the same inputs.
        baselines: Of plain torch, on the same values in fp64.
        dtype: Of the inputs.
        reference_baselines: What the references are compared with, where that is something else.
    """
    reference_baselines = baselines if reference_baselines is None else reference_baselines
    assert results.keys() == references.keys(), f"got {sorted(results)}, expected {sorted(references)}"
    failures = []
    for name, result in results.items():
        reference, baseline = references[name], baselines[name]
        assert result.shape == reference.shape, f"{name}: shape {list(result.shape)}, not {list(reference.shape)}"
        assert result.dtype == reference.dtype, f"{name}: {result.dtype}, not {reference.dtype}"
        failures += _failures(name, result, reference, baseline, reference_baselines[name], dtype)
    assert not failures, "\n".join(failures)


def _failures(
    name: str, result: Tensor, reference: Tensor, baseline: Tensor, reference_baseline: Tensor, dtype: torch.dtype
) -> list[str]:
    if not result.is_floating_point():
        right = (result == baseline) | (result == reference)  # equal but for rounding may fall either way
        return [] if right.all() else [f"{name}: {result} is not {baseline}"]
    finite = baseline.isfinite() & reference.isfinite()
    if not torch.equal(result[~finite].double().nan_to_num(), reference[~finite].double().nan_to_num()):
        return [f"{name}: {result[~finite]} where the reference has {reference[~finite]}"]
    result, reference, baseline = result[finite].double(), reference[finite].double(), baseline[finite]
    of_reference = reference - reference_baseline[finite]
    if baseline.numel() == 0:
        return []
    failures = []
    atol = ATOL[dtype] * max(1.0, baseline.abs().max().item())
    error, allowed = _largest(result - baseline), 2 * _largest(of_reference) + atol
    if not error <= allowed:
        failures.append(f"{name}: largest error {error:.3g}, allowed {allowed:.3g}")
    if baseline.numel() >= _FEWEST:
        norm = baseline.norm().item()
        error, allowed = _norm(result - baseline), 2 * _norm(of_reference)
        allowed += RTOL[dtype] * norm + _FLOOR[dtype] * baseline.numel() ** 0.5
        if not error <= allowed:
            failures.append(f"{name}: error of norm {error:.3g}, allowed {allowed:.3g}, of {norm:.3g}")
    return failures


def _largest(values: Tensor) -> float:
    return values.abs().max().item()


def _norm(values: Tensor) -> float:
    return values.norm().item()
