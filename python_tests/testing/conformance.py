"""An op on a backend held to the reference and its fp64 baseline, on any device."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache

import torch
from torch import Tensor

from testing.assertions import assert_near_baseline
from testing.calls import SOURCES, rounded_dlogits, run
from testing.cases import Case
from testing.inputs import Inputs, build


def assert_conforms(op: str, backend: str, case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """Runs an op on a case's inputs, made on the device, and compares all that it gives with the reference's."""
    inputs, reference, baseline = _expected(op, case, dtype, device)
    assert_near_baseline(run(op, inputs, backend), reference, baseline, dtype)


@lru_cache(maxsize=1)  # the next call asks another backend for the same
def _expected(
    op: str, case: Case, dtype: torch.dtype, device: torch.device
) -> tuple[Inputs, dict[str, Tensor], dict[str, Tensor]]:
    inputs = build(case, dtype, SOURCES[op], device)
    with nullcontext() if dtype == torch.float32 else rounded_dlogits(dtype):
        reference = run(op, inputs, "torch")
    return inputs, reference, run(op, inputs.double(), "torch")
