"""The stages "conformance", "memcheck" and "racecheck": parts of python_tests/test_gpu.py, the latter two sanitized."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import cuda_resources

from gpu.identity import ROOT
from gpu.stage import Stage, main

TESTS = ROOT / "python_tests" / "test_gpu.py"
#: A test's line in pytest's verbose output, in one process or from a worker.
_OUTCOME = re.compile(r"(?:^\[gw\d+\] \[ *\d+%\]|^\S+\.py::.*) (PASSED|FAILED|ERROR|SKIPPED)\b")
#: As the sanitizer names our kernels: Triton's by their ending, of CUDA's all that the build has.
KERNELS = ("_kernel", *{name.split("<")[0] for name in cuda_resources.recorded()[1]})


def run(stage: Stage, options: argparse.Namespace) -> None:
    """Runs the conformance suite in several processes, or the smallest shapes under a tool of compute-sanitizer."""
    stage.need_a_backend()
    if options.what == "conformance":
        selected = "test_small_shapes and 67 and bfloat16 and grpo_loss" if stage.is_dry else "test_conformance_suite"
        stage.attempt(
            "the conformance suite", lambda: run_tests(stage, "conformance", selected, workers=1 if stage.is_dry else 8)
        )
        return
    sanitizer = find_sanitizer()
    if sanitizer is None:
        stage.leave_out("compute-sanitizer is neither on PATH nor where CUDA is installed")
        return
    for backend in sorted(stage.backends):  # CUDA C++ first, where addresses are written out
        stage.attempt(f"{options.what}, {backend}", lambda b=backend: sanitize(stage, sanitizer, options.what, b))


def run_tests(stage: Stage, what: str, selected: str, workers: int) -> None:
    """Runs tests of ``TESTS``, counts them as they end, and keeps a line for each that fails or is skipped.

    Args:
        stage: Where the counts go.
        what: Which tests, for the report.
        selected: An expression of pytest's ``-k``.
        workers: Processes at once, where pytest-xdist is installed.

    Raises:
        RuntimeError: A test failed, or none ran.
    """
    command = [sys.executable, "-m", "pytest", str(TESTS), "-v", "-rfEs", "--tb=short", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["--numprocesses", str(min(workers, os.cpu_count() or 1)), "--dist", "worksteal"]
    tests: dict[str, Any] = {"what": what, "counts": {}, "lines": []}
    stage.entry["found"]["tests"] = tests
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    counts: Counter[str] = Counter()
    command += ["-k", selected]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="")
            if found := _OUTCOME.search(line):
                counts[found[1]] += 1
                tests["counts"] = dict(counts)
                if sum(counts.values()) % 25 == 0:
                    stage.save()
            elif re.match(r"(FAILED|ERROR|SKIPPED) ", line):
                tests["lines"].append(line.strip()[:300])
    if process.returncode or not counts["PASSED"]:
        failed = [line for line in tests["lines"] if not line.startswith("SKIPPED")]
        raise RuntimeError(f"pytest ended with {process.returncode}: {'; '.join(failed)[:200] or 'no test failed'}")


def find_sanitizer() -> str | None:
    """compute-sanitizer, on PATH or of the CUDA toolkit."""
    return shutil.which("compute-sanitizer", path=os.environ.get("PATH", "") + os.pathsep + "/usr/local/cuda/bin")


def sanitize(stage: Stage, sanitizer: str, tool: str, backend: str) -> None:
    """Runs the smallest shapes of a backend under a tool; what it finds in our kernels is an error.

    Raises:
        RuntimeError: It found something in a kernel of ours, or a test failed.
    """
    command = [sanitizer, "--tool", tool, "--error-exitcode", "99"]
    if "--report-api-errors" in subprocess.run([sanitizer, "--help"], capture_output=True, text=True).stdout:
        command += ["--report-api-errors", "no"]  # libraries probe for what a device lacks
    command += [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(TESTS)]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    selected = ["-k", f"test_small_shapes and {backend}"]
    done = subprocess.run([*command, *selected], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)  # fmt: skip
    print(done.stdout)
    if "Device not supported" in done.stdout:
        stage.leave_out("compute-sanitizer does not support this device")
        return
    ours = findings(done.stdout)
    if done.returncode and ours:
        raise RuntimeError(f"{tool} found {ours[0]} (and {len(ours) - 1} more lines)")
    passed = re.search(r"(\d+) passed", done.stdout)
    if passed is None or re.search(r"\d+ (failed|error)", done.stdout):
        raise RuntimeError(f"the tests under {tool} failed: {done.stdout.strip()[-200:]}")
    tests = stage.entry["found"].setdefault("tests", {"what": tool, "counts": {}, "lines": []})
    tests["counts"][f"passed, {backend}"] = int(passed[1])


def findings(output: str) -> Sequence[str]:
    """The lines of the sanitizer that name a kernel of ours."""
    lines = [line for line in output.splitlines() if "=========" in line]
    return [line.strip("= ") for line in lines if any(name in line for name in KERNELS)]


if __name__ == "__main__":
    sys.exit(main(run))
