"""The stages "conformance", "memcheck" and "racecheck": parts of python_tests/test_gpu.py, the latter two sanitized."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import cuda_resources

from gpu.failures import REASON
from gpu.identity import ROOT
from gpu.stage import RunningStage, main
from gpu.stages import NO_TIME

TESTS = ROOT / "python_tests" / "test_gpu.py"
_NAME = re.compile(r"\S+\.py::\S+")
#: A test's line in pytest's verbose output, in one process or from a worker.
_OUTCOME = re.compile(r"(?:^\[gw\d+\] \[ *\d+%\]|^\S+\.py::.*) (PASSED|FAILED|ERROR|SKIPPED)\b")
RESTARTS = ("--max-worker-restart", "10000")  # a test that loses the GPU ends its worker
_TELLING = ("-p", "gpu.failures")  # why a test failed, at once
_SOURCES = (ROOT / "grpo_kernels" / "ops").rglob("*.py")
#: Our kernels by name: Triton's of the sources, and CUDA's.
KERNELS = frozenset(
    {name.split("<")[0] for name in cuda_resources.recorded()[1]}
    | {name for path in _SOURCES for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.MULTILINE)}
)


def run(stage: RunningStage, options: argparse.Namespace) -> None:
    """Runs the conformance suite in several processes, or the smallest shapes under a tool of compute-sanitizer."""
    stage.need_a_backend()
    if options.tool == "conformance":
        selection = [f"{TESTS}::test_conformance_suite"]
        if stage.is_dry:
            selection = [str(TESTS), "-k", "test_small_shapes and 67 and bfloat16 and grpo_loss"]
        suite = partial(run_tests, stage, "conformance", selection, workers=1 if stage.is_dry else 12)
        stage.attempt("the conformance suite", suite, seconds=600)
        return
    sanitizer = find_sanitizer()
    if sanitizer is None:
        stage.leave_out("compute-sanitizer is neither on PATH nor where CUDA is installed")
        return
    backends = sorted(stage.backends)  # CUDA C++ first, where addresses are written out
    for i, backend in enumerate(backends):
        share = (stage.deadline - time.monotonic()) / (len(backends) - i)
        run_tool = partial(sanitize, stage, sanitizer, options.tool, backend, time.monotonic() + share)
        stage.attempt(f"{options.tool}, {backend}", run_tool, seconds=600)


def run_tests(
    stage: RunningStage, what: str, selection: Sequence[str], workers: int, deadline: float | None = None
) -> None:
    """Runs tests of ``TESTS``, counts them as they end, and keeps a line for each that fails or is skipped.

    Args:
        stage: Where the counts go.
        what: Which tests, for the report.
        selection: Arguments of pytest that select them, in their order.
        workers: Processes at once, where pytest-xdist is installed.
        deadline: Of ``time.monotonic``: when the tests are stopped. By default the stage's.

    Raises:
        RuntimeError: A test failed, none ran, or time ran out.
    """
    deadline = stage.deadline if deadline is None else deadline
    command = [sys.executable, "-m", "pytest", "-v", "-rs", "--tb=short", "-p", "no:cacheprovider", "-m", "", *_TELLING]
    if importlib.util.find_spec("xdist") is not None:
        command += ["--numprocesses", str(min(workers, os.cpu_count() or 1)), "--dist", "worksteal", *RESTARTS]
    if importlib.util.find_spec("pytest_timeout") is not None:
        command += ["--timeout", "60"]
    tests: dict[str, Any] = {"what": what, "counts": {}, "lines": []}
    stage.entry["found"]["tests"] = tests
    counts: Counter[str] = Counter()
    failed: set[str] = set()  # one may fail twice, in itself and in its fixture
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    for line in lines_of([*command, *selection], deadline, environment):
        if outcome := _OUTCOME.search(line):
            counts[outcome[1]] += 1
            tests["counts"] = dict(counts)
            if outcome[1] in ("FAILED", "ERROR"):
                failed.update(_NAME.findall(line))
            if sum(counts.values()) % 25 == 0:
                stage.save()
        elif line.startswith(("SKIPPED ", REASON)):
            tests["lines"].append(line.strip()[:500])
    has_ended = time.monotonic() < deadline
    if failed or (has_ended and not counts["PASSED"]):
        raise RuntimeError(f"{len(failed)} tests failed, {counts['PASSED']} passed")
    if not has_ended:
        raise TimeoutError(f"not all of it: {NO_TIME}")


def lines_of(command: Sequence[str], deadline: float, environment: Mapping[str, str]) -> Iterator[str]:
    """The lines of a command's output as they come, up to the deadline, of ``time.monotonic``; they are printed too."""
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip

        def kill() -> None:
            with suppress(ProcessLookupError):  # with what it started, which would keep the pipe open
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(max(0.0, deadline - time.monotonic()), kill)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="")
                yield line
        finally:
            timer.cancel()
            kill()


def find_sanitizer() -> str | None:
    """compute-sanitizer, on PATH or of the CUDA toolkit."""
    return shutil.which("compute-sanitizer", path=os.environ.get("PATH", "") + os.pathsep + "/usr/local/cuda/bin")


def sanitize(stage: RunningStage, sanitizer: str, tool: str, backend: str, deadline: float) -> None:
    """Runs the smallest shapes of a backend under a tool; what it finds in our kernels is an error.

    Raises:
        RuntimeError: It found something in a kernel of ours, or a test failed.
        TimeoutError: It did not end in time.
    """
    command = [sanitizer, "--tool", tool, "--error-exitcode", "99"]
    if "--report-api-errors" in subprocess.run([sanitizer, "--help"], capture_output=True, text=True).stdout:
        command += ["--report-api-errors", "no"]  # libraries probe for what a device lacks
    command += [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "",
                *_TELLING, str(TESTS)]  # fmt: skip
    selected = f"test_small_shapes and {backend}" + (" and 67 and grpo_loss" if stage.is_dry else "")
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    tests = stage.entry["found"].setdefault("tests", {"what": f"{tool}", "counts": {}, "lines": []})
    output: list[str] = []
    for line in lines_of([*command, "-k", selected], deadline, environment):
        output.append(line)
        if outcome := _OUTCOME.search(line):
            name = f"{outcome[1]}, {backend}"
            tests["counts"][name] = tests["counts"].get(name, 0) + 1
            stage.save()
        if findings(line) or line.startswith(REASON):
            tests["lines"].append(line.strip()[:500])
            stage.save()
    text = "".join(output)
    if "Device not supported" in text:
        stage.leave_out("compute-sanitizer does not support this device")
        return
    ours = findings(text)
    if ours:
        raise RuntimeError(f"{tool} found {ours[0]} (and {len(ours) - 1} more lines)")
    if time.monotonic() > deadline:
        raise TimeoutError(f"not all of it: {NO_TIME}")
    counts = [tests["counts"].get(f"{outcome}, {backend}", 0) for outcome in ("PASSED", "FAILED", "ERROR")]
    if not counts[0] or any(counts[1:]):
        raise RuntimeError(f"the tests under {tool} failed: {text.strip()[-200:]}")


def findings(output: str) -> list[str]:
    """The lines of the sanitizer that name a kernel of ours."""
    lines = [line.strip("= \n") for line in output.splitlines() if "=========" in line]
    return [line for line in lines if KERNELS.intersection(re.findall(r"\w+", line))]


if __name__ == "__main__":
    sys.exit(main(run))
