"""What a stage's own process works with: the results that it adds to, the device, the time that it has."""

from __future__ import annotations

import argparse
import faulthandler
import gc
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from interleaved import Comparison, failure
from providers import GPU_BACKENDS
from records import Results
from tables import OURS

from gpu.stages import LOST_CONTEXT, NO_TIME, entry
from grpo_kernels import backends

_RESERVE_SECONDS = 5  # of the limit, to write the results and to end
_PART_SECONDS = 60  # most that a part may take on a GPU: one that hangs does not cost the others their time


class RunningStage:
    """A stage in its own process.

    Attributes:
        results: The whole file's.
        entry: This stage's part of it.
        device: The GPU; in a dry run the CPU.
        only: A regular expression of the parts to do.
        is_dry: Whether it is a dry run: toy sizes on a CPU, under Triton's interpreter.
        deadline: Of ``time.monotonic``: after it no part is begun.
        backends: Ours that run on the device.
    """

    def __init__(self, path: Path, name: str, deadline: float, is_dry: bool, only: str = "") -> None:
        self.path, self.is_dry, self.only = path, is_dry, only
        self.deadline = deadline - _RESERVE_SECONDS
        self.results = Results.load(path)
        self.entry = entry(self.results, name)
        self.device = torch.device("cpu" if is_dry else "cuda")
        names = ("triton",) if is_dry else tuple(GPU_BACKENDS)
        reasons = {name: backends.unsupported_reason("grpo_loss", name, self.device) for name in names}
        self.backends = [name for name, reason in reasons.items() if reason is None]
        for backend, reason in reasons.items():
            if reason is not None:
                self.leave_out(f"backend {backend!r} cannot run: {reason}")

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

    def attempt(
        self, part: str, function: Callable[[], object], seconds: float = _PART_SECONDS, always: bool = False
    ) -> None:
        """Does a part of the stage, if time is left and no process before this one has tried it.

        What fails is said in the results, and the next part is done. A part that takes longer than ``seconds``, or
        leaves the GPU in an error, ends the process; another one goes on after it. ``always``: whatever ``only`` says.
        """
        if part in self.entry["parts"]:
            return
        if not always and not re.search(self.only, part):
            self.leave_out(f"{part}: not in --only {self.only}")
            return
        if time.monotonic() > self.deadline:
            self.entry["failed"].append(f"{part}: {NO_TIME}")
            return
        self.entry["parts"][part] = "begun"
        self.save()
        status = "ok"
        faulthandler.dump_traceback_later(seconds * (10 if self.is_dry else 1), exit=True)
        try:
            function()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        except Exception as error:  # of whatever kind: the stage goes on and ends with 1
            traceback.print_exc()
            self.entry["failed"].append(f"{part}: {', '.join(failure(error))}")
            status = "failed"
        faulthandler.cancel_dump_traceback_later()
        self.entry["parts"][part] = status
        self.save()
        if self.device.type == "cuda":
            _end_if_lost()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def compare(self, measure: Callable[[], Comparison]) -> None:
        """Adds the rows and the notes of a comparison.

        Raises:
            RuntimeError: One of ours failed in it.
        """
        comparison = measure()
        self.results.put(comparison.title, comparison.rows(), comparison.notes)
        is_ours = comparison.work in ("calls", "settings")
        for name, (status, reason) in comparison.refused.items():
            if (is_ours or name.startswith(OURS)) and status != "cannot run":
                raise RuntimeError(f"{name}: {status}, {reason}")

    def leave_out(self, line: str) -> None:
        """Writes what the stage does not do, and why."""
        if line not in self.entry["left_out"]:
            self.entry["left_out"].append(line)
            self.save()

    def save(self) -> None:
        self.results.save(self.path)


def _end_if_lost() -> None:
    """Ends the process where an error stays with its context on the GPU, as after an illegal access."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"the GPU's context is lost: {', '.join(failure(error))}", file=sys.stderr, flush=True)
        os._exit(LOST_CONTEXT)  # without destructors, which would abort in such a context


def main(run: Callable[[RunningStage, argparse.Namespace], None], argv: Sequence[str] | None = None) -> int:
    """The command line of a stage's process; returns 1 if a part of it failed."""
    parser = argparse.ArgumentParser(description=run.__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("tool", nargs="?", default="")
    parser.add_argument("--stage", required=True)
    parser.add_argument("--deadline", type=float, required=True, help="of the monotonic clock")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tune", default="loss:131072")
    parser.add_argument("--only", default="")
    options = parser.parse_args(argv)
    stage = RunningStage(options.results, options.stage, options.deadline, options.dry_run, options.only)
    run(stage, options)
    stage.save()
    for line in stage.entry["failed"]:
        print(f"failed: {line}", file=sys.stderr)
    return int(bool(stage.entry["failed"]))
