"""The headers that host and device share, by their own C++ tests."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import policy_math_cases
import torch

ROOT = Path(__file__).parents[1]


def _run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _tool(name: str) -> str:
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    assert found is not None, f"{name} is not installed"
    return found


def test_shared_headers_pass_their_own_tests(tmp_path: Path) -> None:
    options = [f"-DGRPO_KERNELS_TORCH_DIR={Path(torch.__file__).parent}", "-DGRPO_KERNELS_BUILD_TESTS=ON"]
    _run(_tool("cmake"), "-S", ROOT, "-B", tmp_path, *options)
    _run(_tool("cmake"), "--build", tmp_path, "--target", "cpp_tests", "--parallel", "2")
    told = _run(_tool("ctest"), "--test-dir", tmp_path, "--output-on-failure")
    count = len(list((ROOT / "csrc" / "tests").glob("*.cpp")))
    assert re.search(rf"100% tests passed.* out of {count}$", told, re.MULTILINE), told


def test_their_cases_are_what_the_reference_gives() -> None:
    written = policy_math_cases.FILE.read_text().split()
    now = policy_math_cases.text().split()
    assert len(written) == len(now)
    for old, new in zip(written, now, strict=True):  # another libm may round another way
        assert old == new or math.isclose(float(old), float(new), rel_tol=1e-14, abs_tol=1e-16)
