"""Checks and times the kernels on a GPU, in stages of a process each; the most valuable come first.

Writes ``<results>/<device>/<date>T<time>-<version>.json`` as it goes, the stages' output beside it in ``.log``, and
the tables in ``report.md``. Stages that an earlier result there has as "ok" and whole, for the same commit, sources,
library, device, torch and Triton, are not repeated unless they are named. The exit status is 0, 1 where a stage is not
"ok", or 3 where ``--require-gpu`` finds no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from records import Results
from report import report_device

from gpu import summary
from gpu.identity import ROOT, identity, library_digest
from gpu.stages import STAGES, Stage, entry, run_stage
from grpo_kernels.version import __version__

_DRY_RUN_FACTOR = 5  # of the stages' limits: interpreted kernels on a busy CPU
_LEAST_SECONDS = 15  # with less than that left a stage is not begun


def versions(device: torch.device, same: dict[str, str]) -> dict[str, str]:
    """Of what a figure depends on."""
    found = {"grpo_kernels": __version__, "torch": same["torch"], "triton": same["triton"]}
    found |= {"python": platform.python_version(), "machine": platform.machine()}
    if device.type == "cuda":
        found |= {"cuda": str(torch.version.cuda), "device": same["device"]}
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
        if torch.version.cuda is not None:
            major, minor = torch.cuda.get_device_capability(device)
            found["architecture"] = f"sm_{10 * major + minor}"
    return found | {"commit": same["commit"][:12]}


def results_to_add_to(folder: Path, device: torch.device) -> Path:
    """The newest results of the folder if they are of the same code, device and libraries; else a new file."""
    same = identity(device)
    earlier = sorted(folder.glob("*T*.json"))
    if earlier:
        try:
            if Results.load(earlier[-1]).extra.get("identity") == same:
                return earlier[-1]
        except ValueError as error:
            print(f"not taken over: {error}")
    now = datetime.datetime.now()
    path = folder / f"{now:%Y-%m-%dT%H%M%S}-{__version__}.json"
    results = Results(folder.name, now.date().isoformat(), versions(device, same))
    results.extra = {"identity": same, "stages": {}}
    results.save(path)
    return path


def run(stages: Sequence[Stage], path: Path, seconds: float, named: Sequence[str], options: Sequence[str]) -> bool:
    """Runs the stages that are not done yet, in order, within ``seconds``; returns whether all are "ok"."""
    factor = _DRY_RUN_FACTOR if "--dry-run" in options else 1
    end = time.monotonic() + seconds
    is_ok = True
    for stage in stages:
        found = Results.load(path).extra["stages"].get(stage.name)
        is_done = found is not None and found["status"] == "ok" and not found["left_out"]
        if is_done and stage.name not in named:
            print(f"{stage.name}: taken over from an earlier run", flush=True)
            continue
        left = end - time.monotonic()
        if left < _LEAST_SECONDS:
            found = leave_out(path, stage.name, f"no time was left of {seconds:.0f} s")
        else:
            limit = min(left, factor * stage.seconds)
            print(f"{stage.name}: {stage.what} (at most {limit:.0f} s)", flush=True)
            found = run_stage(stage, path, limit, options)
            if stage.name == "build":
                name_library(path)
        print(f"  {summary.outcome(found)}", flush=True)
        report_device(path.parent)
        is_ok &= found["status"] == "ok"
        if found["found"].get("backends") == []:  # none of the other stages could do anything
            break
    return is_ok


def name_library(path: Path) -> None:
    """Puts the CUDA library as it is now into the results' identity."""
    results = Results.load(path)
    results.extra["identity"]["library"] = library_digest()
    results.save(path)


def leave_out(path: Path, name: str, reason: str) -> dict[str, Any]:
    """Writes that a stage was not begun."""
    results = Results.load(path)
    found = entry(results, name)
    found |= {"status": "left out", "reason": reason}
    results.save(path)
    return found


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(prog="gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(names)}; by default all but "
                        f"{' and '.join(stage.name for stage in STAGES if not stage.by_default)}")  # fmt: skip
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--seconds", type=float, default=560, help="of the whole run")
    parser.add_argument("--only", default="", help="of the stages' parts, by a regular expression")
    parser.add_argument("--rounds", type=int, default=7, help="of each timing")
    parser.add_argument("--tune", default="loss:131072", help="what the stage tune tries, as kernel:vocabulary")
    parser.add_argument("--require-gpu", action="store_true", help="exit with 3 where there is no GPU")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on a CPU, with TRITON_INTERPRET=1")
    options = parser.parse_args(argv)
    unknown = [name for name in options.stages if name not in names]
    if unknown:
        parser.error(f"unknown stage {', '.join(unknown)}; the stages are {', '.join(names)}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    device = torch.device("cpu" if options.dry_run else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        print(f"skipped: torch {torch.__version__} sees no CUDA or ROCm device here")
        return 3 if options.require_gpu else 0
    name = "dry-run" if options.dry_run else torch.cuda.get_device_name(device)
    path = results_to_add_to(options.results / re.sub(r"[^a-z0-9]+", "-", name.lower()), device)
    by_name = {stage.name: stage for stage in STAGES}
    stages = [by_name[name] for name in dict.fromkeys(options.stages)]
    stages = stages or [stage for stage in STAGES if stage.by_default]
    given = [
        "--rounds",
        str(options.rounds),
        "--tune",
        options.tune,
        "--only",
        options.only,
        *(["--dry-run"] if options.dry_run else []),
    ]
    is_ok = run(stages, path, options.seconds, options.stages, given)
    report_device(path.parent)
    print(f"\n{(path.parent / 'report.md').read_text()}\nwritten: {path}")
    return int(not is_ok)


if __name__ == "__main__":
    sys.exit(main())
