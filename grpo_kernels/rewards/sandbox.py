"""Runs untrusted Python programs, on Linux, where they neither see nor change anything outside.

``sandbox_child.py`` says what such a program finds, and how that is done. This side starts it, talks to it and ends it.
"""

from __future__ import annotations

import functools
import json
import os
import selectors
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from select import PIPE_BUF
from typing import Any, Literal, NamedTuple

_CHILD = Path(__file__).with_name("sandbox_child.py")
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store", "/etc/ld.so.cache")
_PROCESSES = 16
_GRACE = 5.0  # seconds that the sandbox has to take itself down

# Tries what a sandbox must prevent: that the kernel took an order does not prove that it obeys it.
_TRIAL = """\
import os, socket, sys, time

def succeeds(function, *arguments):
    try:
        function(*arguments)
    except OSError:
        return False
    return True

leaks = ["network"] if succeeds(socket.socket) else []
leaks += ["other processes"] if os.path.exists("/proc/self") or os.getppid() != 1 else []
for folder in {"/", "/usr", sys.prefix}:
    if succeeds(os.mkdir, folder + "/trial"):
        os.rmdir(folder + "/trial")
        leaks.append(folder)
for i in range(int(input())):
    if not succeeds(lambda: os.fork() or time.sleep(60)):
        break
else:
    leaks.append("any number of processes")
print(*leaks, sep=", ", flush=True)
"""


class Outcome(NamedTuple):
    """How a program ended, and what it wrote until then.

    The statuses: "ok", exit code 0; "error", another one, as after an exception (also for memory or the size of a
    file); "killed", by a signal; "cpu_time", "wall_time" and "output", more of it than allowed.
    """

    status: Literal["ok", "error", "killed", "cpu_time", "wall_time", "output"]
    stdout: str
    stderr: str


def run(
    program: str,
    stdin: str = "",
    *,
    seconds: float = 10.0,
    cpu_seconds: int = 5,
    memory_bytes: int = 512 * 2**20,
    file_bytes: int = 16 * 2**20,
    processes: int = _PROCESSES,
    open_files: int = 64,
    output_bytes: int = 2**20,
) -> Outcome:
    """Runs a Python program on its own: the standard library, its input, an empty folder, and nothing else.

    It takes about a tenth of a second on top of the program's own time. Threads may run several programs at once.

    Args:
        program: Python source, for the version that runs this.
        stdin: What it reads.
        seconds: Wall time, with the start of Python.
        cpu_seconds: CPU time of each of its processes.
        memory_bytes: Address space of each of its processes. Python takes some 30 MiB.
        file_bytes: Size of the working folder, which is in memory.
        processes: At most, threads counted, with up to three of the sandbox's own.
        open_files: File descriptors of each of its processes.
        output_bytes: Of standard output, and of standard error. Beyond it the program is ended.

    Raises:
        ValueError: A limit is not positive.
        RuntimeError: Programs cannot be isolated here; ``unavailable()`` is the reason. Nothing has run then.
    """
    limits = {
        "seconds": seconds, "cpu_seconds": cpu_seconds, "memory_bytes": memory_bytes, "file_bytes": file_bytes,
        "processes": processes, "open_files": open_files, "output_bytes": output_bytes,
    }  # fmt: skip
    for name, value in limits.items():
        if not value > 0:
            raise ValueError(f"{name} must be greater than 0, got {value}")
    reason = unavailable()
    if reason:
        raise RuntimeError(f"untrusted programs cannot be isolated on this machine: {reason}")
    return _execute(program, stdin, limits)


@functools.cache
def unavailable() -> str:
    """Why programs cannot be isolated here, or an empty text: the answer of one trial, made by the first call."""
    if sys.platform != "linux":
        return f"the sandbox needs Linux, this is {sys.platform}"
    limits = {
        "seconds": 60.0, "cpu_seconds": 10, "memory_bytes": 2**29, "file_bytes": 2**20, "processes": _PROCESSES,
        "open_files": 64, "output_bytes": 2**16,
    }  # fmt: skip
    try:
        outcome = _execute(_TRIAL, f"{_PROCESSES}\n", limits)
    except (OSError, RuntimeError) as error:
        return str(error)
    if outcome.status != "ok":
        return f"a trial program ended with {outcome}"
    leaks = outcome.stdout.strip()
    return f"a trial program had access to: {leaks}" if leaks else ""


def _execute(program: str, stdin: str, limits: dict[str, Any]) -> Outcome:
    python, visible = _python()
    settings = json.dumps({"program": program, "python": python, "visible": visible, "limits": limits}).encode()
    request = struct.pack("!Q", len(settings)) + settings + stdin.encode(errors="replace")
    status_read, status_write = os.pipe()
    try:
        try:
            process = subprocess.Popen(
                [python, "-I", "-S", str(_CHILD), str(status_write)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                env={},
                cwd="/",
                pass_fds=(status_write,),
                start_new_session=True,
            )
        finally:
            os.close(status_write)  # the child's copy is the last one: it closes when the sandbox is gone
        try:
            ended, received = _converse(process, status_read, request, limits)
        finally:
            _end(process)
    finally:
        os.close(status_read)
    return _outcome(ended, received, limits["output_bytes"])


def _python() -> tuple[str, list[str]]:
    """Python without virtual environments, and the paths it needs.

    Raises:
        RuntimeError: They would show the user's home.
    """
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    python = os.path.realpath(os.path.join(sys.base_prefix, "bin", name))
    prefix = os.path.realpath(sys.base_prefix)
    if Path(os.path.realpath(Path.home())).is_relative_to(prefix):
        raise RuntimeError(f"Python's folder {prefix} has the home folder {Path.home()} in it")
    covered = any(Path(prefix).is_relative_to(path) for path in _SYSTEM)
    return python, [*_SYSTEM, *([] if covered else [prefix])]


def _converse(
    process: subprocess.Popen[bytes], status_fd: int, request: bytes, limits: dict[str, Any]
) -> tuple[Literal["wall_time", "output"] | None, dict[str, bytes]]:
    """Writes the request and reads all that comes back, until the other side has closed everything or is stopped."""
    deadline = time.monotonic() + limits["seconds"]
    received = {"status": b"", "stdout": b"", "stderr": b""}
    unsent = memoryview(request)
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdin, selectors.EVENT_WRITE, "stdin")
        for name, source in (("status", status_fd), ("stdout", process.stdout), ("stderr", process.stderr)):
            selector.register(source, selectors.EVENT_READ, name)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                return "wall_time", received
            for key, _ in selector.select(left):
                if key.data == "stdin":
                    try:
                        unsent = unsent[os.write(key.fd, unsent[:PIPE_BUF]) :]
                    except BrokenPipeError:  # the program ended before it had read everything
                        unsent = unsent[:0]
                    if not unsent:
                        selector.unregister(key.fileobj)
                        process.stdin.close()
                    continue
                chunk = os.read(key.fd, 2**16)
                if not chunk:
                    selector.unregister(key.fileobj)
                received[key.data] += chunk
                if len(received[key.data]) > limits["output_bytes"]:
                    return "output", received
    return None, received


def _end(process: subprocess.Popen[bytes]) -> None:
    """Takes the sandbox down, where it is not gone already, and closes its pipes."""
    with process:  # closes, and waits at last
        process.terminate()  # the outside process then kills the first of the namespace, with it every other
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _outcome(ended: Literal["wall_time", "output"] | None, received: dict[str, bytes], output_bytes: int) -> Outcome:
    reports = [json.loads(line) for line in received["status"].splitlines()]
    stdout, stderr = (received[name][:output_bytes].decode(errors="replace") for name in ("stdout", "stderr"))
    for report in reports:
        if "refused" in report:
            raise RuntimeError(report["refused"])
    if ended is not None:
        return Outcome(ended, stdout, stderr)
    if not reports:
        raise RuntimeError(f"the sandbox died without a report; it wrote {stderr[-500:]!r}")
    if "signal" in reports[0]:
        return Outcome("cpu_time" if reports[0]["signal"] == signal.SIGXCPU else "killed", stdout, stderr)
    return Outcome("ok" if reports[0]["exit"] == 0 else "error", stdout, stderr)
