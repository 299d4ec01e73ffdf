"""The bounds of test_aot.py with the other releases of Triton that are recorded, each in a folder of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton_resources import recorded  # noqa: E402

TESTS = Path(__file__).parent
#: Between them they launch every kernel that takes rows, aligned and not, in place and not.
CASES = "plain or full_fp32 or prime or compared or others or anywhere"
SELECTED = f"({CASES}) and not large and not softly and not sm_80"


@pytest.mark.early
@pytest.mark.full
@pytest.mark.parametrize("release", [release for release in recorded() if release != triton.__version__])
def test_bounds_hold_for_other_releases(release: str, tmp_path: Path) -> None:
    """Two minutes each."""
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target", str(tmp_path)]
    done = subprocess.run([sys.executable, *install, f"triton=={release}"], capture_output=True, text=True)
    assert done.returncode == 0, f"Triton {release} could not be installed:\n{done.stdout}{done.stderr}"
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(tmp_path), str(TESTS.parent)]))
    version = [sys.executable, "-W", "ignore", "-c", "import triton; print(triton.__version__)"]
    told = subprocess.run(version, env=environment, capture_output=True, text=True, check=True).stdout
    assert told.strip() == release
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "", "-k", SELECTED]
    command = [sys.executable, "-m", "pytest", *options, f"{TESTS}/test_aot.py"]
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    counted = re.search(r"(\d+) passed", done.stdout)
    assert counted and int(counted[1]) >= 30, done.stdout
