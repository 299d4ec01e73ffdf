"""Instructions that the C++ row kernels take for a logit: the same on every run, whatever else the machine does."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
VOCAB = 32768
#: Counted with GCC 12, by instruction set, kernel and type; callgrind knows no AVX-512.
BOUNDS = {
    ("avx2", "statistics", "float"): 4.88,
    ("avx2", "statistics", "bfloat16"): 5.22,
    ("avx2", "gradient", "float"): 3.38,
    ("avx2", "gradient", "bfloat16"): 4.64,
    ("avx2", "divergence", "float"): 19.6,
    ("baseline", "statistics", "float"): 14.4,
    ("baseline", "gradient", "float"): 9.26,
}
#: Another patch release of the compiler may move a few instructions.
SLACK = 1.05


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that runs one kernel, built as the library is."""
    build = tmp_path_factory.mktemp("build")
    torch_folder = Path(torch.__file__).parent
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    assert cmake is not None
    for command in (
        [cmake, "-S", str(ROOT), "-B", str(build), f"-DGRPO_KERNELS_TORCH_DIR={torch_folder}"],
        [cmake, "--build", str(build), "--target", "run_row_kernels", "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "run_row_kernels"


def _other_compiler() -> str:
    """Why the recorded numbers do not hold here; empty if they do."""
    if platform.machine() != "x86_64":
        return f"recorded on x86-64, this is {platform.machine()}"
    first = subprocess.run(["c++", "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    return (
        ""
        if re.search(r"\b12\.\d+\.\d+$", first) and "clang" not in first
        else f"recorded with GCC 12, this is {first}"
    )


@pytest.mark.full
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
@pytest.mark.skipif(_other_compiler() != "", reason=_other_compiler())
@pytest.mark.parametrize(("level", "kernel", "dtype"), list(BOUNDS))
def test_instructions_of_a_logit(program: Path, tmp_path: Path, level: str, kernel: str, dtype: str) -> None:
    def instructions(rows: int) -> int:
        profiler = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={tmp_path / 'out'}"]
        command = [*profiler, str(program), level, kernel, dtype, str(VOCAB), str(rows)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return int(re.search(r"Collected : (\d+)", done.stderr)[1])

    counted = (instructions(3) - instructions(1)) / (2 * VOCAB)
    bound = BOUNDS[level, kernel, dtype]
    assert bound / SLACK <= counted <= bound * SLACK, (
        f"{counted:.3f} instructions a logit, recorded {bound}: fewer are to be recorded, more to be explained"
    )
