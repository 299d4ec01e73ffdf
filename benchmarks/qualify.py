"""Whether providers are right, and what memory they take: each in a process of its own, before any is timed.

A provider that crashes, hangs or takes more memory than there is ends its process alone; the tasks after the one that
ended it get a new process. Run as a script, it is that process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from interleaved import failure
from memory import Peak, available
from problems import TASKS, TOLERANCES, Problem, buffer, errors, head_problem, logits_problem, refill
from providers import Provider, providers

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
    backend: str = "auto",
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
        backend: Ours.
        among: Whom; all, if not given.
        seconds: That one case may take, the imports before it included.
        processes: How many providers at a time.
        script: What runs in the processes; a test's own, to try what it must withstand.
    """

    def ask(provider: Provider) -> Verdicts:
        served = [case for case in cases if case[0] in provider.tasks]
        missing = provider.missing(device)
        if missing:
            return {(provider.name, case): Verdict("cannot run", missing) for case in served}
        found: list[Verdict] = []
        while len(found) < len(served):
            command = [sys.executable, str(script), provider.name, device, backend]
            found += _one_process(command, served[len(found) :], sizes, seconds)
        return {(provider.name, case): verdict for case, verdict in zip(served, found, strict=True)}

    with ThreadPoolExecutor(processes) as pool:
        return {key: verdict for part in pool.map(ask, among or providers(backend)) for key, verdict in part.items()}


def _one_process(command: list[str], cases: Sequence[Case], sizes: Sizes, seconds: float) -> list[Verdict]:
    """The verdicts of one process: on all cases, or up to the one that ended it."""
    reader, writer = os.pipe()
    arguments = ["--cases", json.dumps(cases), "--sizes", json.dumps(asdict(sizes)), "--write-to", str(writer)]
    found: list[Verdict] = []
    with tempfile.TemporaryFile("w+") as output, os.fdopen(reader) as lines:
        process = subprocess.Popen([*command, *arguments], pass_fds=[writer], stdout=output, stderr=output,
                                   env=_environment(), start_new_session=True)  # fmt: skip
        os.close(writer)
        while len(found) < len(cases):
            ready, _, _ = select.select([lines], [], [], seconds)
            line = lines.readline() if ready else ""
            if not line:
                break
            verdict = json.loads(line)
            verdict["peaks"] = {int(tokens): peak for tokens, peak in verdict["peaks"].items()}
            found.append(Verdict(**verdict))
        ended = bool(ready)
        if not ended:
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        if len(found) < len(cases):
            output.seek(0)
            last = (output.read().strip().splitlines() or [""])[-1]
            found.append(_ending(code, seconds, last) if ended else Verdict("timed out", f"after {seconds:.0f} s"))
    return found


def _environment() -> dict[str, str]:
    """One thread for each process, as many of which run as there are cores."""
    return os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def _ending(code: int, seconds: float, last: str) -> Verdict:
    if code == -signal.SIGKILL:
        return Verdict("out of memory", "killed, as the system does when memory runs out")
    if code < 0:
        return Verdict("crashed", f"{signal.Signals(-code).name}; {last}"[:300])
    return Verdict("crashed", f"exit status {code}; {last}"[:300])


def judge(provider: Provider, case: Case, sizes: Sizes, device: str) -> Verdict:
    """Errors on a small problem against fp64; then, on a CPU, the peaks of memory at the sizes asked."""
    task, dtype = case[0], getattr(torch, case[1])
    try:
        function = provider.tasks[task]()
        off = errors(function, task, _problem(task, *sizes.exact, dtype, device, ragged=True), provider.padded)
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
    parser.add_argument("backend")
    parser.add_argument("--cases", type=json.loads, required=True)
    parser.add_argument("--sizes", type=json.loads, required=True)
    parser.add_argument("--write-to", type=int, required=True)
    options = parser.parse_args()
    provider = next(provider for provider in providers(options.backend) if provider.name == options.provider)
    sizes = Sizes(**options.sizes)
    if options.device == "cpu":  # an allocation beyond what is free raises, where the system would kill the process
        resource.setrlimit(resource.RLIMIT_DATA, (available(),) * 2)
    with os.fdopen(options.write_to, "w") as lines:
        for case in options.cases:
            verdict = judge(provider, tuple(case), sizes, options.device)
            lines.write(json.dumps(asdict(verdict)) + "\n")
            lines.flush()


if __name__ == "__main__":
    main()
