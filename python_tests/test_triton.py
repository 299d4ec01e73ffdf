"""The Triton backend under Triton's interpreter: in a process of its own, for it is switched on before the import."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_kernels.testing.calls import SOURCES, applies
from grpo_kernels.testing.cases import ALL_CASES

TESTS = Path(__file__).parent
CASES = {case.name: case for case in ALL_CASES}
#: One of each way through the kernels; `make test-full` runs all.
USUAL = (
    ("float32", "next_token_layout"),
    ("float32", "packed_sequence"),
    ("float32", "some_advantages"),
    ("float32", "rewards"),
    ("bfloat16", "grad_output"),
    ("float16", "dirty_mask"),
    ("float64", "transform_all"),
)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def passed(*arguments: str) -> int:
    """How many tests pass under the interpreter; all that are selected must."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = dict(os.environ, TRITON_INTERPRET="1")
    result = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    counted = re.search(r"(\d+) passed", result.stdout)
    assert counted and " skipped" not in result.stdout, result.stdout
    return int(counted[1])


def test_conformance() -> None:
    function = f"{TESTS}/test_conformance.py::test_op_is_near_its_fp64_baseline"
    selected = [
        f"{function}[{op}-triton-{dtype}-{name}]" for op in SOURCES for dtype, name in USUAL if applies(op, CASES[name])
    ]
    assert passed(*selected) == len(selected)


def test_edges() -> None:
    assert passed(f"{TESTS}/test_edges.py", "-k", "triton") >= 5


@pytest.mark.slow
def test_conformance_of_every_case() -> None:
    files = (f"{TESTS}/{name}.py" for name in ("test_conformance", "test_group_advantages"))
    assert passed(*files, "-k", "triton") > 1000


@pytest.mark.slow
def test_opcheck() -> None:
    assert passed(f"{TESTS}/test_compile.py", "-k", "opcheck") > len(SOURCES)
