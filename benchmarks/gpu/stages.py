"""The stages in the order of what they are worth, and how one of them is run: in a process of its own."""

from __future__ import annotations

import os
import sys
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


#: How a line of ``failed`` ends for a part that was not begun.
NO_TIME = "no time was left"
STAGES = (
    Stage("build", 180, "the CUDA library: the one that is there, or a build for this GPU", "gpu.build"),
    Stage("alive", 30, "fp32 output of addmm; every op and six conformance cases on each backend", "gpu.alive"),
    Stage("headline", 200, "the figures of README and DESIGN, with naive PyTorch, TRL and Liger", "gpu.headline"),
    Stage("currencies", 90, "longest sequence, peak memory and time of two models' heads under TRL", "gpu.currencies"),
    Stage("bytes", 60, "DRAM bytes of the loss kernels, by Nsight Compute", "gpu.dram"),
    Stage("proof", 180, "real sizes, 2^31 logits, bit-equal runs, graphs, waits, TRL's trainer", "gpu.proof"),
    Stage("conformance", 300, "every conformance case", "gpu.checks", ("conformance",)),
    Stage("works", 420, "every other comparison, with every peer", "gpu.works", by_default=False),
    Stage("tune", 180, "one kernel's block sizes at one vocabulary: --tune loss:131072", "gpu.tune", by_default=False),
    Stage("memcheck", 200, "compute-sanitizer: accesses out of bounds", "gpu.checks", ("memcheck",)),
    Stage("racecheck", 200, "compute-sanitizer: races of shared memory", "gpu.checks", ("racecheck",)),
)


def entry(results: Results, name: str) -> dict[str, Any]:
    """What the results say of a stage, to be added to; a new entry where they say nothing.

    ``status`` is "ok", "failed", "timeout", "killed", or "left out" where no time was left to begin it; ``seconds``
    what it took; ``reason`` a line, empty with "ok"; ``left_out`` and ``failed`` a line for each part that was
    not done or failed; ``found`` what it found beside rows.
    """
    new = {"status": "killed", "seconds": 0.0, "reason": "the run ended before it did", "left_out": [], "failed": []}
    return results.extra.setdefault("stages", {}).setdefault(name, {**new, "found": {}})


def run_stage(stage: Stage, path: Path, seconds: float, options: Sequence[str] = ()) -> dict[str, Any]:
    """Runs a stage within ``seconds`` and writes its entry into the results at ``path``; returns the entry.

    The stage's process adds rows and findings to the same file as it gets them, so that what it has is kept however
    it ends. Its output goes to the end of the file ``.log`` beside the results.
    """
    results = Results.load(path)
    results.extra.setdefault("stages", {}).pop(stage.name, None)
    entry(results, stage.name)
    results.save(path)
    log = path.with_suffix(".log")
    with log.open("a") as file:
        file.write(f"\n==== {stage.name}: {stage.what}\n")
    command = [sys.executable, "-m", stage.module, str(path), *stage.arguments]
    command += ["--stage", stage.name, "--seconds", f"{seconds:.0f}", *options]
    outcome = processes.run(command, seconds, log, environment())
    results = Results.load(path)
    found = entry(results, stage.name)
    status, reason = outcome.status, outcome.reason
    if status == "failed" and found["failed"]:
        reason = found["failed"][0]
        reason += f" (and {len(found['failed']) - 1} more)" if len(found["failed"]) > 1 else ""
        if all(line.endswith(NO_TIME) for line in found["failed"]):
            status = "timeout"
    found |= {"status": status, "seconds": round(outcome.seconds, 1), "reason": reason}
    results.save(path)
    return found


def environment() -> dict[str, str]:
    """Of a stage's process: this checkout's packages; memory that can grow in place; results that can be repeated."""
    folders = [ROOT, ROOT / "benchmarks", ROOT / "python_tests"]
    paths = [*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        # read when CUDA starts: blocks of another size do not make the allocator give memory back inside a timing
        "PYTORCH_ALLOC_CONF": os.environ.get("PYTORCH_ALLOC_CONF", "expandable_segments:True"),
    }
