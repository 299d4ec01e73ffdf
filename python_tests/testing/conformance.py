"""An op on a backend held to what is expected of it, on any device."""

from __future__ import annotations

from functools import lru_cache

import torch

from testing.calls import SOURCES, run
from testing.cases import Case
from testing.expected import Expected
from testing.inputs import build


def assert_conforms(op: str, backend: str, case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """Runs an op on a case's inputs, made on the device, and compares all that it gives with the reference's."""
    expected = expected_of(op, case, dtype, device)
    expected.assert_near(run(op, expected.inputs, backend))


@lru_cache(maxsize=1)  # the next call asks another backend for the same
def expected_of(op: str, case: Case, dtype: torch.dtype, device: torch.device) -> Expected:
    """What a GPU's backends are to give, whose heads round the gradient of logits to half precision before a GEMM."""
    inputs = build(case, dtype, SOURCES[op], device)
    return Expected.of(op, inputs, dtype, rounds_dlogits=dtype != torch.float32)
