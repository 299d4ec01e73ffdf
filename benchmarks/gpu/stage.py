"""What a stage's own process works with: the results that it adds to, the device, the time that it has."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from interleaved import Comparison, failure
from providers import GPU_BACKENDS
from records import Results
from tables import OURS

from gpu.stages import NO_TIME, entry
from grpo_kernels import registry

#: The share of its limit that a stage keeps to write and to end in, and the most seconds of it.
_RESERVE_SHARE, _RESERVE_SECONDS = 0.1, 6


class Stage:
    """A running stage.

    Attributes:
        results: The whole file's.
        entry: This stage's part of it.
        device: The GPU; in a dry run the CPU.
        is_dry: Whether it is a dry run: toy sizes on a CPU, under Triton's interpreter.
        deadline: Of ``time.monotonic``: after it nothing new is begun.
        backends: Ours that run on the device.
    """

    def __init__(self, path: Path, name: str, seconds: float, is_dry: bool) -> None:
        self.path, self.is_dry = path, is_dry
        self.deadline = time.monotonic() + seconds - min(_RESERVE_SHARE * seconds, _RESERVE_SECONDS)
        self.results = Results.load(path)
        self.entry = entry(self.results, name)
        self.device = torch.device("cpu" if is_dry else "cuda")
        asked = ("triton",) if is_dry else tuple(GPU_BACKENDS)
        reasons = {name: registry.unsupported_reason("grpo_loss", name, self.device) for name in asked}
        self.backends = [name for name, reason in reasons.items() if reason is None]
        self.entry["left_out"] += [f"backend {n!r} cannot run: {why}" for n, why in reasons.items() if why is not None]

    @property
    def ours(self) -> dict[str, str]:
        """Our backends by the names of providers."""
        return {f"{OURS}, {GPU_BACKENDS[backend]}": backend for backend in self.backends}

    def need_a_backend(self) -> None:
        """Ends the stage where none of ours runs."""
        self.entry["found"]["backends"] = self.backends
        if not self.backends:
            self.save()
            raise SystemExit("nothing of ours runs here: " + "; ".join(self.entry["left_out"]))

    def attempt(self, what: str, function: Callable[[], object]) -> None:
        """Does a part of the stage, if time is left; what fails is said in the results, and the rest still runs."""
        if time.monotonic() > self.deadline:
            self.entry["failed"].append(f"{what}: {NO_TIME}")
            return
        try:
            function()
        except Exception as error:  # of whatever kind: the stage goes on and ends with 1
            self.entry["failed"].append(f"{what}: {', '.join(failure(error))}")
        self.save()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # an error of the device that stays ends the stage here
            torch.cuda.empty_cache()

    def compare(self, measure: Callable[[], Comparison]) -> None:
        """Adds the rows and the notes of a comparison."""
        comparison = measure()
        self.results.put(comparison.title, comparison.rows(), comparison.notes)

    def leave_out(self, line: str) -> None:
        self.entry["left_out"].append(line)
        self.save()

    def save(self) -> None:
        self.results.save(self.path)


def main(run: Callable[[Stage, argparse.Namespace], None], argv: Sequence[str] | None = None) -> int:
    """The command line of a stage's process; returns 1 if a part of it failed."""
    parser = argparse.ArgumentParser(description=run.__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("what", nargs="?", default="")
    parser.add_argument("--stage", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tune", default="loss:131072")
    options = parser.parse_args(argv)
    stage = Stage(options.results, options.stage, options.seconds, options.dry_run)
    run(stage, options)
    stage.save()
    for line in stage.entry["failed"]:
        print(f"failed: {line}", file=sys.stderr)
    return int(bool(stage.entry["failed"]))
