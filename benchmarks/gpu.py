"""All that needs a GPU, in one command: the checks of test_gpu.py, then every time over the floor of its own run.

Writes ``<results>/<device>/<date>-<version>.json`` and ``.md``, and prints the table last. With ``--smoke`` and
Triton's interpreter it runs on a CPU at toy sizes: shows that it runs, not how fast.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_work import Sizes, accuracy, comparisons
from interleaved import Comparison

from grpo_kernels import registry
from grpo_kernels.version import __version__

ROOT = Path(__file__).parents[1]
#: A test's line in pytest's verbose output, in one process or from a worker.
_OUTCOME = re.compile(r"(?:^\[gw\d+\] \[ *\d+%\]|^\S+\.py::.*) (PASSED|FAILED|ERROR|SKIPPED)\b")
TESTS = ROOT / "python_tests" / "test_gpu.py"


def checks(seconds: float, log: Path) -> dict[str, Any]:
    """Runs the tests, their output into a file; how many passed, what failed, what was skipped and why."""
    command = [sys.executable, "-m", "pytest", str(TESTS), "-v", "-rfEs", "--tb=short", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["--numprocesses", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"]
    environment = dict(os.environ, PYTHONPATH=str(ROOT), CUBLAS_WORKSPACE_CONFIG=":4096:8", PYTHONUNBUFFERED="1")
    with log.open("w") as file:
        run = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code, ended = run.wait(seconds), ""
            ended = "" if code in (0, 1) else f"pytest ended with {code}"
        except subprocess.TimeoutExpired:
            code, ended = 1, f"stopped after {seconds:.0f} s"
            os.killpg(run.pid, signal.SIGKILL)  # its workers too, which would share the GPU with what follows
            run.wait()
    lines = log.read_text().splitlines()
    outcomes = [found[1] for line in lines if (found := _OUTCOME.search(line))]
    told = [line for line in lines if re.match(r"(FAILED|ERROR|SKIPPED) ", line)]
    return {"passes": code == 0, "counts": dict(Counter(outcomes)), "ended": ended, "lines": told}


def versions(device: torch.device) -> dict[str, str]:
    """Of what a figure depends on."""
    import triton

    found = {"grpo_kernels": __version__, "torch": torch.__version__, "triton": triton.__version__}
    found |= {"python": platform.python_version(), "machine": platform.machine()}
    if device.type == "cuda":
        found |= {"cuda": str(torch.version.cuda), "device": torch.cuda.get_device_name(device)}
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return found


def markdown(report: dict[str, Any], done: list[Comparison]) -> str:
    """The report for people."""
    lines = [f"# {report['device']}, {report['date']}", ""]
    lines += [", ".join(f"{name} {value}" for name, value in report["versions"].items()), ""]
    check = report["checks"]
    counts = ", ".join(f"{count} {word.lower()}" for word, count in check.get("counts", {}).items()) or "not run"
    lines += [f"Checks: {counts} {check.get('ended', '')}".rstrip(), *check.get("lines", [])[:20], ""]
    for comparison in done:
        lines += [comparison.title, *(f"    {line}" for line in comparison.lines()), ""]
    for row in report["accuracy"]:
        error = f"{row['error']:.3g}, of whole fp32 logits {row['reference']:.3g}"
        lines.append(f"Error of {row['what']}: {error}, ratio {row['ratio']:.2f} (asked: at most {row['asked']})")
    lines += [f"Left out: {what}" for what in report["left_out"]]
    lines += [f"Failed: {what}" for what in report["failed"]]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=560, help="of the whole: what would begin later is left out")
    parser.add_argument("--no-checks", action="store_true", help="only the times")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, on a CPU under Triton's interpreter")
    options = parser.parse_args()
    start = time.monotonic()
    device = torch.device("cpu" if options.smoke else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        print(f"skipped: torch {torch.__version__} sees no CUDA or ROCm device here")
        return 0
    reason = registry.unsupported_reason("grpo_loss", "triton", device)
    if reason is not None:
        print(f"cannot run: {reason}")
        return 1
    name = "smoke" if options.smoke else re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower())
    report: dict[str, Any] = {"device": name, "date": datetime.date.today().isoformat(), "versions": versions(device)}
    sizes = Sizes.smoke() if options.smoke else Sizes()
    folder = options.results / name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{report['date']}-{__version__}"
    log = path.with_suffix(".log")
    report |= {
        "checks": {} if options.no_checks else checks(0.6 * options.seconds, log),
        "accuracy": [],
        "left_out": [],
        "failed": [],
    }
    done: list[Comparison] = []

    def attempt(what: str, function: Callable[[], None]) -> None:
        if time.monotonic() - start > options.seconds - 15:
            report["left_out"].append(f"{what}: no time was left")
            return
        try:
            function()
        except Exception as error:  # out of memory, a wrong result: said in the report, and the others still run
            report["failed"].append(f"{what}: {type(error).__name__}: {error}")
        path.with_suffix(".json").write_text(json.dumps({**report, "rows": _rows(done)}, indent=1) + "\n")

    attempt("accuracy", lambda: report["accuracy"].extend(accuracy(sizes, device)))
    for what, measure in comparisons(sizes, device):
        attempt(what, lambda measure=measure: done.append(measure(options.rounds)))
    text = markdown(report, done)
    path.with_suffix(".md").write_text(text)
    has_passed = report["checks"].get("passes", True)
    if not has_passed:
        print(log.read_text()[-5000:])
    print(text)
    return int(not has_passed or bool(report["failed"]))


def _rows(done: list[Comparison]) -> list[dict[str, Any]]:
    """One row a time, of one shape."""
    rows = []
    for comparison in done:
        for name in comparison.times:
            low, high = comparison.spread(name)
            row = {"work": comparison.title, "contender": name, "p20_ms": low * 1e3, "p80_ms": high * 1e3}
            row |= {"median_ms": comparison.median(name) * 1e3, "over_floor": comparison.over_floor(name)}
            row |= {"asked": comparison.targets.get(name), "peak_bytes": comparison.peaks.get(name)}
            rows.append(row | {"notes": comparison.notes, "rounds": len(comparison.times[name])})
    return rows


if __name__ == "__main__":
    sys.exit(main())
