"""Whether providers are right, and what memory they take: each in a process of its own, before any is timed.

A provider that crashes, hangs or takes more memory than there is ends its process alone; the tasks after the one that
ended it get a new process. Run as a script, it is that process.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from interleaved import failure
from memory import Peak, available
from problems import TASKS, TOLERANCES, Problem, buffer, errors, head_problem, logits_problem, refill
from providers import OURS_ON_CPU, Provider, providers
from tables import OURS

#: What is asked of a provider: a task and a dtype.
Case = tuple[str, str]


@dataclass(frozen=True)
class Sizes:
    """Of the problems that providers are checked on.

    Args:
        exact: N, H and V where all is formed in fp64.
        tokens: The N of the works, at which memory is taken: half of it under any gradient.
        fewer: For the loss from hidden states also these, so that the growth with N shows.
        head: H and V there.
    """

    exact: tuple[int, int, int] = (64, 896, 32768)
    tokens: int = 512
    fewer: tuple[int, ...] = (128, 256)
    head: tuple[int, int] = (896, 151936)

    @classmethod
    def quick(cls) -> Sizes:
        return cls((32, 64, 997), 16, (), (64, 4099))

    def told(self) -> str:
        """What errors and memory are of, for a report."""
        n, h, v = self.exact
        return (
            f"Errors are the largest against fp64 on problems of N={n} H={h} V={v}, some tokens masked and some ratios "
            "clipped: log-probs in nats, the loss over the mean advantage, gradients relative to their norm; where "
            "live rows and frozen heads are timed, "
            "also on those. Memory is a process's resident peak beyond the inputs, on one thread."
        )

    def of(self, task: str) -> tuple[int, ...]:
        """The numbers of tokens that a task's memory is taken at."""
        return {"hidden": (*self.fewer, self.tokens), "upstream": (self.tokens // 2,)}.get(task, (self.tokens,))


@dataclass(frozen=True)
class Verdict:
    """On a provider at a case; with status "ok" it may be timed."""

    status: str
    reason: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    peaks: dict[int, int] = field(default_factory=dict)  # bytes beyond the inputs, by tokens


Verdicts = dict[tuple[str, Case], Verdict]


def qualify(
    cases: Sequence[Case],
    sizes: Sizes,
    device: str = "cpu",
    ours: Mapping[str, str] = OURS_ON_CPU,
    among: Sequence[Provider] | None = None,
    seconds: float = 120,
    processes: int = os.cpu_count() or 1,
    script: Path = Path(__file__),
) -> Verdicts:
    """A verdict on every provider at every case that it serves.

    Args:
        cases: What to ask.
        sizes: Of the problems.
        device: "cpu" or "cuda".
        ours: Our backends by the names of providers. They are checked first, and by themselves.
        among: Which providers; all, if not given.
        seconds: That one case may take, and the imports before the first. Of the others on a GPU half of it.
        processes: How many providers at a time, each with its share of the memory and one thread.
        script: What runs in the processes; a test's own, to try what it must withstand.
    """

    def ask(provider: Provider, seconds: float) -> Verdicts:
        served = [case for case in cases if case[0] in provider.tasks]
        missing = provider.missing(device)
        if missing:
            return {(provider.name, case): Verdict("cannot run", missing) for case in served}
        found: list[Verdict] = []
        while len(found) < len(served):
            command = [sys.executable, str(script), provider.name, device, json.dumps(dict(ours))]
            startup = seconds if device == "cuda" else max(seconds, _STARTUP_SECONDS)
            found += _one_process(command, served[len(found) :], sizes, seconds, startup, processes)
        return {(provider.name, case): verdict for case, verdict in zip(served, found, strict=True)}

    every = providers(ours) if among is None else among
    groups = [[one for one in every if one.name.startswith(OURS) == is_ours] for is_ours in (True, False)]
    found: Verdicts = {}
    for group, limit in zip(groups, (seconds, seconds if device == "cpu" else seconds / 2), strict=True):
        with ThreadPoolExecutor(processes) as pool:
            for part in pool.map(partial(ask, seconds=limit), group):
                found |= part
    return found


def _one_process(
    command: list[str], cases: Sequence[Case], sizes: Sizes, seconds: float, startup: float, processes: int
) -> list[Verdict]:
    """The verdicts of one process: on all cases, or up to the one that ended it."""
    reader, writer = os.pipe()
    arguments = ["--cases", json.dumps(cases), "--sizes", json.dumps(asdict(sizes)), "--write-to", str(writer)]
    arguments += ["--processes", str(processes)]
    found: list[Verdict] = []
    with tempfile.TemporaryFile("w+") as output, open(reader, "rb", buffering=0) as lines:
        process = subprocess.Popen([*command, *arguments], pass_fds=[writer], stdout=output, stderr=output,
                                   env=_environment(), start_new_session=True)  # fmt: skip
        os.close(writer)
        line, has_ended = _line(lines, startup)  # that the imports are done
        if not line and not has_ended:  # another process would hang in them too
            _ended(process, 0)
            return [Verdict("timed out", f"in its imports, after {startup:.0f} s")] * len(cases)
        while line and len(found) < len(cases):
            line, has_ended = _line(lines, seconds)
            if line:
                verdict = json.loads(line)
                verdict["peaks"] = {int(tokens): peak for tokens, peak in verdict["peaks"].items()}
                found.append(Verdict(**verdict))
        code = _ended(process, 10 if has_ended or len(found) == len(cases) else 0)
        if len(found) < len(cases):
            output.seek(0)
            last = (output.read().strip().splitlines() or [""])[-1]
            found.append(_ending(code, last) if has_ended else Verdict("timed out", f"after {seconds:.0f} s"))
    return found


_STARTUP_SECONDS = 120


def _line(lines: Any, seconds: float) -> tuple[bytes, bool]:
    """The next line of a pipe, empty if there is none in time, and whether the pipe has ended."""
    if not select.select([lines], [], [], seconds)[0]:
        return b"", False
    line = lines.readline()
    return line, not line


def _ended(process: subprocess.Popen[str], seconds: float) -> int:
    """The exit status of a process and what it started, which are killed if it does not end."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def _ending(code: int, last: str) -> Verdict:
    if code == -signal.SIGKILL:
        return Verdict("out of memory", "killed, as the system does when memory runs out")
    if code < 0:
        return Verdict("crashed", f"{signal.Signals(-code).name}; {last}"[:300])
    return Verdict("crashed", f"exit status {code}; {last}"[:300])


def _environment() -> dict[str, str]:
    """One thread for each process, as many of which run as there are cores."""
    return os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def judge(provider: Provider, case: Case, sizes: Sizes, device: str) -> Verdict:
    """The largest errors on small problems against fp64; then, on a CPU, the peaks of memory at the sizes asked."""
    task, dtype = case[0], getattr(torch, case[1])
    try:
        function = provider.tasks[task]()
        off: dict[str, float] = {}
        for problem in _checked(task, _problem(task, *sizes.exact, dtype, device, ragged=True)):
            found = errors(function, task, problem, provider.padded)
            off |= {name: max(error, off.get(name, 0.0), key=_or_infinite) for name, error in found.items()}
        wrong = {name: error for name, error in off.items() if not error <= TOLERANCES[dtype]}
        if wrong:
            listed = ", ".join(f"{name} off by {error:.2g}" for name, error in wrong.items())
            return Verdict("wrong", f"{listed}; tolerated {TOLERANCES[dtype]:g}", off)
        peaks = {}
        if device == "cpu":
            for tokens in sizes.of(task):
                peaks[tokens] = _peak(provider, function, _problem(task, tokens, *sizes.head, dtype, device), task)
        return Verdict("ok", "", off, peaks)
    except Exception as error:  # whatever a package raises is its row
        return Verdict(*failure(error))


def _checked(task: str, problem: Problem) -> list[Problem]:
    """What a task is checked on: all rows live, and where works have it also a quarter, and a frozen head."""
    found = [problem]
    if task in ("hidden", "upstream"):
        found.append(problem.with_live(0.25))
    if task == "hidden":
        found.append(replace(problem, frozen=True))
    return found


def _or_infinite(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _problem(task: str, tokens: int, hidden_size: int, vocab: int, dtype: torch.dtype, device: str,
             ragged: bool = False) -> Problem:  # fmt: skip
    if task == "logits":
        return logits_problem(tokens, vocab, dtype, device, ragged)
    return head_problem(tokens, hidden_size, vocab, dtype, device, ragged)


def _peak(provider: Provider, function: Any, problem: Problem, task: str) -> int:
    """Resident memory that a run adds at its highest, in bytes; gradients that it returns count."""
    work = buffer(problem, provider.padded) if provider.in_place else None
    if work is not None:
        refill(work, problem)
    if provider.compiles:
        TASKS[task](function, problem, work)
    with Peak() as peak:
        TASKS[task](function, problem, work)
    return peak.bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("provider")
    parser.add_argument("device")
    parser.add_argument("ours", type=json.loads)
    parser.add_argument("--cases", type=json.loads, required=True)
    parser.add_argument("--sizes", type=json.loads, required=True)
    parser.add_argument("--write-to", type=int, required=True)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    provider = next(provider for provider in providers(options.ours) if provider.name == options.provider)
    sizes = Sizes(**options.sizes)
    if options.device == "cpu":  # an allocation beyond what is free raises, where the system would kill the process
        resource.setrlimit(resource.RLIMIT_DATA, (available() // options.processes,) * 2)
    with os.fdopen(options.write_to, "w") as lines:
        lines.write("ready\n")
        lines.flush()
        for case in options.cases:
            verdict = judge(provider, tuple(case), sizes, options.device)
            lines.write(json.dumps(asdict(verdict)) + "\n")
            lines.flush()


if __name__ == "__main__":
    main()
