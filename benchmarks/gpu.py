"""All that needs a GPU, in one command: the checks of test_gpu.py, then every time over the floor of its own run.

Every backend that runs there is checked and timed; the report says why another does not. Writes
``<results>/<device>/<date>-<version>.json`` and ``.md``, and prints the table last; ``--only`` and ``--no-checks`` add
to what a run of the same day left there. With ``--smoke`` and Triton's interpreter it runs on a CPU at toy sizes: shows
that it runs, not how fast.
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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import dram
import tables
import torch
from gpu_work import CASES, Sizes, accuracy, comparisons
from interleaved import Comparison, failure
from providers import GPU_BACKENDS, OURS, providers
from qualify import qualify
from records import Results

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
    found = {"grpo_kernels": __version__, "torch": torch.__version__}
    found |= {"triton": metadata.version("triton")} if importlib.util.find_spec("triton") else {}
    architectures = [f"sm_{arch}" for arch in registry.cuda_architectures()]
    found |= {"CUDA kernels": " ".join(architectures)} if architectures else {}
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
    lines += [f"- {dram.told(row)}" for row in extra["dram"]]
    lines += [f'- "auto" takes {backend} for {", ".join(ops)}' for backend, ops in extra["auto"].items()]
    lines += [f"- Over what is asked: {line}" for line in over_asked(results)]
    lines += [f"- Left out: {what}" for what in extra["left_out"]]
    lines += [f"- Failed: {what}" for what in extra["failed"]]
    return "\n".join(lines) + "\n\n" + tables.markdown(results)


def over_asked(results: Results) -> list[str]:
    """What took more than is asked of it."""
    rows = [row for row in results.rows if row.asked is not None and row.over_floor > row.asked]
    return [f"{row.provider}, {row.title}: {row.over_floor:.2f}x of {row.asked:.2f}x" for row in rows]


class Run:
    """What is done one after the other, and kept at once: for an interrupted run leaves what it has."""

    def __init__(self, results: Results, path: Path, device: torch.device, deadline: float, only: str) -> None:
        self.results, self.path, self.device, self.deadline, self.only = results, path, device, deadline, only

    def is_asked(self, what: str) -> bool:
        return re.search(self.only, what) is not None

    def attempt(self, what: str, function: Callable[[], object]) -> None:
        """Does it if it is asked for and time is left; what fails is said in the report, and the others still run."""
        if not self.is_asked(what):
            return
        if time.monotonic() > self.deadline:
            self.results.extra["left_out"].append(f"{what}: no time was left")
        else:
            try:
                function()
                if self.device.type == "cuda":
                    gc.collect()
                    torch.cuda.empty_cache()
            except Exception as error:  # of whatever kind: the run goes on and ends with 1
                self.results.extra["failed"].append(f"{what}: {', '.join(failure(error))}")
        self.keep()

    def keep(self) -> None:
        self.results.save(self.path)
        self.path.with_suffix(".md").write_text(headed(self.results))

    def compare(self, measure: Callable[[], Comparison]) -> None:
        comparison = measure()
        self.results.put(comparison.title, comparison.rows(), comparison.notes)

    def judge(self, sizes: Sizes, backend: str) -> None:
        found = accuracy(sizes, self.device, backend)
        names = {row["what"] for row in found}
        kept = [row for row in self.results.extra["accuracy"] if row["what"] not in names]
        self.results.extra["accuracy"] = kept + found

    def count_bytes(self, backends: Sequence[str], tokens: int, vocab: int) -> None:
        """By Nsight Compute, where it is and may."""
        ncu = dram.find_ncu()
        try:
            if ncu is None:
                raise dram.NotCountedError("ncu is neither on PATH nor where CUDA is installed")
            self.results.extra["dram"] = dram.measure(ncu, backends, tokens, vocab, _NCU_SECONDS)
        except dram.NotCountedError as error:
            self.results.extra["left_out"].append(f"DRAM bytes: {error}")


_NCU_SECONDS = 150


def begun(path: Path, device: torch.device, part: str | None = None) -> Results:
    """The results to add to: empty ones, or those that are there, less what was said of the ``part`` done again."""
    results = Results(path.parent.name, datetime.date.today().isoformat(), versions(device))
    results.extra = {"accuracy": [], "dram": [], "checks": {}, "left_out": [], "failed": []}
    if part is not None and path.exists():
        found = Results.load(path)
        results.rows, results.notes = found.rows, found.notes
        results.extra |= found.extra
        for name in ("left_out", "failed"):
            results.extra[name] = [line for line in results.extra[name] if not re.search(f"{part}|^backend", line)]
    resolved = {op: registry.resolve(op, "auto", device) for op in registry.OPS}
    auto = {name: [op for op in registry.OPS if resolved[op] == name] for name in dict.fromkeys(resolved.values())}
    results.extra["auto"] = auto
    return results


def running(asked: Sequence[str], device: torch.device) -> tuple[list[str], list[str]]:
    """The backends that run on a device, and why the others do not."""
    reasons = {name: registry.unsupported_reason("grpo_loss", name, device) for name in asked}
    absent = [f"backend {name!r} cannot run: {reason}" for name, reason in reasons.items() if reason is not None]
    return [name for name in asked if reasons[name] is None], absent


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=560, help="of the whole: what would begin later is left out")
    parser.add_argument("--no-checks", action="store_true", help="only the times")
    parser.add_argument("--only", default="", help="what of it, by a regular expression: 'checks|^calls'")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, on a CPU under Triton's interpreter")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    start = time.monotonic()
    device = torch.device("cpu" if options.smoke else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        print(f"skipped: torch {torch.__version__} sees no CUDA or ROCm device here")
        return 0
    backends, absent = running(["triton"] if options.smoke else list(GPU_BACKENDS), device)
    for line in absent:
        print(line, flush=True)
    if not backends:
        return 1
    name = "smoke" if options.smoke else re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower())
    sizes = Sizes.smoke() if options.smoke else Sizes()
    path = options.results / name / f"{datetime.date.today().isoformat()}-{__version__}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = begun(path, device, options.only if options.no_checks or options.only else None)
    results.extra["checked"] = sizes.checked.told()
    results.extra["left_out"] += absent
    auto = backends[0] if options.smoke else "auto"
    among = [one for one in providers(auto) if one.name in ("naive PyTorch", OURS)] if options.smoke else None
    limits = {"seconds": 120 if options.smoke else 40, "processes": 4}
    log = path.with_suffix(".log")
    run = Run(results, path, device, start + options.seconds - 15, options.only)
    with ThreadPoolExecutor() as pool:  # neither is timed, so they share the GPU
        judged = pool.submit(qualify, CASES, sizes.checked, device.type, auto, among, **limits)
        if not options.no_checks and run.is_asked("checks"):
            results.extra["checks"] = checks(0.6 * options.seconds, log)
        verdicts = judged.result()
    run.keep()
    for name in backends:
        run.attempt(f"accuracy, {name}", lambda name=name: run.judge(sizes, name))
    if device.type == "cuda":
        run.attempt("DRAM bytes", lambda: run.count_bytes(backends, sizes.tokens[0], sizes.vocabularies[0]))
    for what, measure in comparisons(sizes, device, verdicts, backends, options.rounds, run.deadline):
        run.attempt(what, lambda measure=measure: run.compare(measure))
    has_passed = results.extra["checks"].get("passes", True)
    if not has_passed:
        print(log.read_text()[-5000:])
    print(headed(results))
    ours = [row for row in results.rows if row.work in ("settings", "calls") or row.provider.startswith(OURS)]
    has_failed = any(row.status not in ("ok", "cannot run") for row in ours)
    return int(not has_passed or bool(results.extra["failed"]) or has_failed)


if __name__ == "__main__":
    # read when CUDA starts: blocks of another size do not make the allocator give memory back inside a timing
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    sys.exit(main())
