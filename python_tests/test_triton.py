"""The Triton backend under Triton's interpreter: in processes of its own, for it is switched on before the import."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from testing.calls import SOURCES

TESTS = Path(__file__).parent
TABLE = TESTS.parent / "grpo_kernels" / "ops" / "rows" / "triton" / "triton_blocks.json"
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


def conformance(tier: str, part: int, parts: int) -> int:
    """How many tests of one part of the conformance suite pass, for as many workers of the test run."""
    files = [f"{TESTS}/{name}.py" for name in ("test_conformance", "test_group_advantages")]
    return passed(*files, "-m", tier, "-k", "triton", "--part", f"{part}/{parts}")


@pytest.mark.early
@pytest.mark.parametrize("part", range(2))
def test_conformance(part: int) -> None:
    assert conformance("not full", part, 2) > 60


@pytest.mark.early
@pytest.mark.full
@pytest.mark.parametrize("part", range(8))
def test_the_rest_of_conformance(part: int) -> None:
    assert conformance("full", part, 8) > 100


@pytest.mark.early
@pytest.mark.parametrize(
    ("names", "fewest"),
    [
        (("test_reference", "test_edges", "test_interpreted"), 60),
        (("test_gae", "test_loss_family"), 50),
        pytest.param(("test_limits",), 100, marks=pytest.mark.full),
        pytest.param(("test_divergence",), 40, marks=pytest.mark.full),
    ],
)
def test_other_files(names: tuple[str, ...], fewest: int) -> None:
    assert passed(*(f"{TESTS}/{name}.py" for name in names), "-m", "", "-k", "triton or interpreted") >= fewest


@pytest.mark.early
@pytest.mark.full
def test_any_loss_is_trls() -> None:
    pytest.importorskip("trl")
    assert passed(f"{TESTS}/test_trl.py", "-m", "", "-k", "test_any_loss_is_trls") == 1


def _smoke(script: str, *arguments: str, interpret: bool = True) -> str:
    """What a benchmark prints at toy sizes."""
    root = TESTS.parent
    environment = dict(os.environ, PYTHONPATH=str(root), TRITON_INTERPRET=str(int(interpret)))
    command = [sys.executable, str(root / "benchmarks" / script), *arguments]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tuning_without_a_gpu_says_so() -> None:
    assert "sees no CUDA or ROCm device" in _smoke("tune.py", interpret=False)


@pytest.mark.early
@pytest.mark.full
def test_tuned_rows_join_the_shipped_table(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    _smoke("tune.py", "--smoke", "--rounds", "1", "--table", str(path))
    rows, shipped = (json.loads(table.read_text())["blocks"] for table in (path, TABLE))
    added = [row for row in rows if row not in shipped]
    assert {(row["kernel"], row["itemsize"]) for row in added} == {
        (kernel, itemsize) for kernel in ("statistics", "gradient", "loss") for itemsize in (2, 4)
    }
    assert all(row["source"] == "measured" for row in added)
    assert all(row in rows for row in shipped)


@pytest.mark.early
@pytest.mark.parametrize("tier", ["not full", pytest.param("full", marks=pytest.mark.full)])
def test_opcheck(tier: str) -> None:
    assert passed(f"{TESTS}/test_compile.py", "-m", tier, "-k", "opcheck") > len(SOURCES)
