"""The Triton backend under Triton's interpreter: in processes of its own, for it is switched on before the import."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_kernels.testing.calls import SOURCES

TESTS = Path(__file__).parent
PARTS = 8  # of the conformance suite: for as many workers of the test run
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def passed(*arguments: str) -> int:
    """How many tests pass under the interpreter; all that are selected must."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    environment = dict(os.environ, TRITON_INTERPRET="1")
    result = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    counted = re.search(r"(\d+) passed", result.stdout)
    assert counted and " skipped" not in result.stdout, result.stdout
    return int(counted[1])


@pytest.mark.parametrize("part", range(PARTS))
def test_conformance(part: int) -> None:
    files = [f"{TESTS}/{name}.py" for name in ("test_conformance", "test_group_advantages")]
    assert passed(*files, "-k", "triton", "--part", f"{part}/{PARTS}") > 150


def test_edges() -> None:
    assert passed(f"{TESTS}/test_edges.py", f"{TESTS}/test_interpreted.py", "-k", "triton or interpreted") >= 8


def test_what_gpus_are_checked_for_at_small_sizes() -> None:
    assert passed(f"{TESTS}/test_gpu.py", "-m", "not gpu") > 80


@pytest.mark.slow
def test_opcheck() -> None:
    assert passed(f"{TESTS}/test_compile.py", "-k", "opcheck") > len(SOURCES)
