"""All that needs a GPU, in one command: the checks of test_gpu.py, then every time over the floor of its own run.

Writes ``<results>/<device>/<date>-<version>.json`` and ``.md``, and prints the table last. With ``--smoke`` and
Triton's interpreter it runs on a CPU at toy sizes: shows that it runs, not how fast.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.util
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from gpu_work import CASES, Sizes, accuracy, comparisons
from interleaved import Comparison, failure
from providers import OURS, providers
from qualify import qualify

from grpo_kernels import registry
from grpo_kernels.bench import tables
from grpo_kernels.bench.results import Results
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
    environment = dict(
        os.environ,
        PYTHONPATH=os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        CUBLAS_WORKSPACE_CONFIG=":4096:8",
        PYTHONUNBUFFERED="1",
    )
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


def headed(results: Results) -> str:
    """The report for people: checks and accuracy, then every table."""
    extra = results.extra
    check = extra["checks"]
    counts = ", ".join(f"{count} {word.lower()}" for word, count in check.get("counts", {}).items()) or "not run"
    lines = [f"# {tables.described(results)}", "", f"Checks: {counts} {check.get('ended', '')}".rstrip(), ""]
    lines += [f"- {line}" for line in check.get("lines", [])[:20]] + [""]
    for row in extra["accuracy"]:
        error = f"{row['error']:.3g}, of whole fp32 logits {row['reference']:.3g}"
        lines.append(f"- Error of {row['what']}: {error}, ratio {row['ratio']:.2f} (asked: at most {row['asked']})")
    lines += [f"- Left out: {what}" for what in extra["left_out"]]
    lines += [f"- Failed: {what}" for what in extra["failed"]]
    return "\n".join(lines) + "\n\n" + tables.markdown(results)


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
    results = Results(name, datetime.date.today().isoformat(), versions(device))
    sizes = Sizes.smoke() if options.smoke else Sizes()
    path = options.results / name / f"{results.date}-{__version__}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    log = path.with_suffix(".log")
    failed: list[str] = []
    left_out: list[str] = []
    deadline = start + options.seconds - 15
    results.extra = {"accuracy": [], "left_out": left_out, "failed": failed, "checks": {}}
    results.extra["checked"] = sizes.checked.told()
    among = [one for one in providers("triton") if one.name in ("naive PyTorch", OURS)] if options.smoke else None
    limits = {"seconds": 120 if options.smoke else 40, "processes": 4}
    with ThreadPoolExecutor() as pool:  # neither is timed, so they share the GPU
        judged = pool.submit(qualify, CASES, sizes.checked, device.type, "triton", among, **limits)
        if not options.no_checks:
            results.extra["checks"] = checks(0.6 * options.seconds, log)
        verdicts = judged.result()
    results.save(path)

    def attempt(what: str, function: Callable[[], object]) -> None:
        if time.monotonic() > deadline:
            left_out.append(f"{what}: no time was left")
        else:
            try:
                function()
                if device.type == "cuda":
                    gc.collect()
                    torch.cuda.empty_cache()
            except Exception as error:  # said in the report, and the others still run
                failed.append(f"{what}: {', '.join(failure(error))}")
        results.save(path)
        path.with_suffix(".md").write_text(headed(results))

    attempt("accuracy", lambda: results.extra["accuracy"].extend(accuracy(sizes, device)))
    for what, measure in comparisons(sizes, device, verdicts, options.rounds, deadline):
        attempt(what, lambda measure=measure: _keep(results, measure()))
    has_passed = results.extra["checks"].get("passes", True)
    if not has_passed:
        print(log.read_text()[-5000:])
    print(headed(results))
    ours = [row for row in results.rows if row.provider.startswith(OURS) and row.status not in ("ok", "cannot run")]
    return int(not has_passed or bool(failed or ours))


def _keep(results: Results, comparison: Comparison) -> None:
    results.put(comparison.title, comparison.rows(), comparison.notes)


if __name__ == "__main__":
    # read when CUDA starts: blocks of another size do not make the allocator give memory back inside a timing
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    sys.exit(main())
