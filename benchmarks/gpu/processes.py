"""Runs a command within a time limit and leaves no process of it behind (Linux)."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_KILL_SECONDS = 20  # after which a process that cannot be killed, as in a driver's call, is left and named


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Args:
        status: "ok" (exit status 0), "failed" (another), "timeout", or "killed" (ended by a signal that is not ours).
        seconds: How long it ran.
        reason: One line; empty with "ok".
        code: The exit status; negative after a signal, None at the limit.
    """

    status: str
    seconds: float
    reason: str = ""
    code: int | None = None


def run(command: Sequence[str], seconds: float, log: Path, environment: Mapping[str, str] | None = None) -> Outcome:
    """Runs a command, its output appended to a file; whatever it has started and left is killed.

    Args:
        command: The program and its arguments.
        seconds: Its limit. At the limit it is killed.
        log: The file.
        environment: Its variables; by default those of this process.
    """
    _adopt_orphans()
    kept = set(_descendants())
    start = time.monotonic()
    with log.open("ab") as output:
        begin = output.tell()
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=_end_with_parent,
        )  # fmt: skip
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # also when this process is interrupted
            took = time.monotonic() - start
            left = _kill_all_but(kept, process)
            if left:
                output.write(f"could not be killed: {left}\n".encode())
    if code is None:
        return Outcome("timeout", took, f"stopped at its limit of {seconds:.0f} s")
    if code < 0:
        name = signal.Signals(-code).name
        hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        return Outcome("killed", took, f"ended by {name}{hint}", code)
    if code:
        return Outcome("failed", took, _last_line(log, begin) or f"exit status {code}", code)
    return Outcome("ok", took, code=0)


def _last_line(log: Path, begin: int) -> str:
    """The last line that says something, of what was written from a position on."""
    with log.open("rb") as file:
        file.seek(max(begin, log.stat().st_size - 4096))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    return next((line[:300] for line in reversed(lines) if line), "")


def _adopt_orphans() -> None:
    """Makes this process the parent of a descendant whose own parent ends, so that it can be found."""
    if ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        print("prctl(PR_SET_CHILD_SUBREAPER) failed: what a stage leaves may outlive it", file=sys.stderr)


def _end_with_parent() -> None:
    """Has the child killed when this process ends, however it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _kill_all_but(kept: set[int], process: subprocess.Popen[bytes]) -> list[int]:
    """Kills every descendant that is new, until there is none: one may start another while they are listed.

    Returns those that are still there after ``_KILL_SECONDS``.
    """
    end = time.monotonic() + _KILL_SECONDS
    while True:
        new = [pid for pid in _descendants() if pid not in kept]
        if not new or time.monotonic() > end:
            return new
        for pid in new:
            with suppress(ProcessLookupError):  # it has ended by itself
                os.kill(pid, signal.SIGKILL)
        for pid in new:
            if pid != process.pid:  # its exit status is for ``process`` to collect
                with suppress(ChildProcessError):  # not adopted yet
                    os.waitpid(pid, os.WNOHANG)
        process.poll()
        time.sleep(0.01)


def _descendants() -> list[int]:
    """The processes that this one started, and those that they started."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()  # after the name, which may hold anything
        except OSError:  # it has ended since
            continue
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found: list[int] = []
    waiting = [os.getpid()]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found
