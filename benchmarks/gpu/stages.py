"""The stages in the order of what they are worth, and how one of them is run: in a process of its own."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from records import Results

from gpu import processes
from gpu.identity import ROOT


@dataclass(frozen=True)
class Stage:
    """A part of the run.

    Args:
        name: As ``STAGES`` of the Makefile and the report call it.
        seconds: Its limit.
        what: What it does, in a line.
        module: What runs it: ``python -m <module> <results> ...``.
        arguments: Given to the module too.
        by_default: Whether a run without names has it.
    """

    name: str
    seconds: float
    what: str
    module: str
    arguments: tuple[str, ...] = ()
    by_default: bool = True


_LEAST_SECONDS = 15  # with less than that left no process is started again
#: How a line of ``failed`` ends for a part that was not begun.
NO_TIME = "no time was left"
#: The exit status of a stage's process whose GPU context is of no more use: another process goes on.
LOST_CONTEXT = 75
STAGES = (
    Stage("build", 180, "the CUDA library: the one that is there, or a build for this GPU", "gpu.build"),
    Stage("alive", 45, "fp32 output of addmm; every op and six conformance cases on each backend", "gpu.alive"),
    Stage("headline", 200, "the figures of README and DESIGN, with naive PyTorch, TRL and Liger", "gpu.headline"),
    Stage("currencies", 90, "longest sequence, peak memory and time of two models' heads under TRL", "gpu.currencies"),
    Stage("bytes", 110, "DRAM bytes of the loss kernels, by Nsight Compute", "gpu.dram"),
    Stage("proof", 240, "real sizes, 2^31 logits, bit-equal runs, graphs, waits, TRL's trainer", "gpu.proof"),
    Stage("conformance", 300, "every conformance case", "gpu.checks", ("conformance",)),
    Stage("works", 420, "every other comparison, with every peer", "gpu.other_works", by_default=False),
    Stage(
        "tune",
        180,
        "a kernel's block sizes at one vocabulary",
        "gpu.tune_blocks",
        by_default=False,
    ),
    Stage("memcheck", 120, "compute-sanitizer: accesses out of bounds", "gpu.checks", ("memcheck",)),
    Stage("racecheck", 120, "compute-sanitizer: races of shared memory", "gpu.checks", ("racecheck",)),
)


def entry(results: Results, name: str) -> dict[str, Any]:
    """What the results say of a stage, to be added to; a new entry where they say nothing.

    ``status`` is "ok", "failed", "timeout", "killed", or "left out" where no time was left to begin it; ``seconds``
    what it took; ``reason`` a line, empty with "ok"; ``parts`` what became of each part; ``left_out`` and ``failed`` a
    line for each part that was not done or failed; ``found`` what it found beside rows.
    """
    new = {"status": "killed", "seconds": 0.0, "reason": "the run ended before it did", "left_out": [], "failed": []}
    return results.extra.setdefault("stages", {}).setdefault(name, {**new, "parts": {}, "found": {}})


def run_stage(stage: Stage, path: Path, seconds: float, options: Sequence[str] = ()) -> dict[str, Any]:
    """Runs a stage within ``seconds`` and writes its entry into the results at ``path``; returns the entry.

    The stage's process adds rows and findings to the same file as it gets them, so that what it has is kept however
    it ends. Where its process ends within a part of the stage, another one goes on with the parts after it. Its output
    goes to the end of the file ``.log`` beside the results.
    """
    _begin(stage.name, path, options[options.index("--only") + 1] if "--only" in options else "")
    log = path.with_suffix(".log")
    with log.open("a") as file:
        file.write(f"\n==== {stage.name}: {stage.what}\n")
    start = time.monotonic()
    while True:
        parts_before = len(entry(Results.load(path), stage.name)["parts"])
        left, begin = start + seconds - time.monotonic(), log.stat().st_size
        command = [sys.executable, "-m", stage.module, str(path), *stage.arguments, "--stage", stage.name]
        command += ["--deadline", f"{start + seconds:.1f}", *options]
        outcome = processes.run(command, left, log, environment(Results.load(path)))
        results = Results.load(path)
        found = entry(results, stage.name)
        lost = [part for part, status in found["parts"].items() if status == "begun"]
        for part in lost:
            found["parts"][part] = "failed"
            found["failed"].append(f"{part}: {_why_it_ended(outcome, log, begin)}")
        results.save(path)
        may_go_on = outcome.status != "timeout" and start + seconds - time.monotonic() > _LEAST_SECONDS
        has_died = outcome.code == LOST_CONTEXT or (outcome.code or 0) < 0
        if not may_go_on or not (lost or (has_died and len(found["parts"]) > parts_before)):
            break
    status, reason = _judge(outcome, found["failed"])
    found |= {"status": status, "seconds": round(time.monotonic() - start, 1), "reason": reason}
    results.save(path)
    return found


def _begin(name: str, path: Path, only: str) -> None:
    """Begins a stage's entry anew; where ``only`` some of its parts are done, those that are "ok" are kept."""
    results = Results.load(path)
    earlier = results.extra.setdefault("stages", {}).pop(name, None)
    new = entry(results, name)
    if only and earlier is not None:
        kept = {part: "ok" for part, status in earlier["parts"].items() if status == "ok" and not re.search(only, part)}
        new.update(parts=kept, found=earlier["found"], verdicts=earlier.get("verdicts", []))
    results.save(path)


def _judge(outcome: processes.Outcome, failed: Sequence[str]) -> tuple[str, str]:
    """The status and the reason of a stage, by how its last process ended and what failed in it."""
    if not failed:
        return outcome.status, outcome.reason
    status = "failed" if outcome.status == "ok" else outcome.status
    if all(line.endswith(NO_TIME) for line in failed):
        status = "timeout"
    reason = failed[0] if outcome.status in ("ok", "failed") else f"{outcome.reason}; {failed[0]}"
    return status, reason + (f" (and {len(failed) - 1} more)" if len(failed) > 1 else "")


def _why_it_ended(outcome: processes.Outcome, log: Path, begin: int) -> str:
    """Why a part was the last of its process, in a line; ``begin``: where the process's output begins."""
    if outcome.status == "failed" and b"Timeout (" in log.read_bytes()[begin:]:  # as faulthandler begins
        return "took longer than a part may; the log shows where it was"
    return outcome.reason or "its process ended"


def environment(results: Results) -> dict[str, str]:
    """Of a stage's process: this checkout's packages; memory that can grow in place; no hub of models."""
    folders = [ROOT, ROOT / "benchmarks", ROOT / "python_tests"]
    paths = [*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])]
    # blocks that can grow do not make the allocator give memory back inside a timing
    allocator = results.extra.get("allocator", "expandable_segments:True")
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "PYTORCH_ALLOC_CONF": os.environ.get("PYTORCH_ALLOC_CONF", allocator),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
