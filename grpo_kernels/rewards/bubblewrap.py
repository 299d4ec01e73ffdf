"""The executor "bubblewrap": untrusted Python programs in a sandbox that bwrap makes, on Linux.

A program finds Python and the system's libraries, read only, four devices, and its working folder, /tmp, which is empty
and in memory. It finds no network, no home, no /proc, no environment, no capability, no process but its own, and none
of the system calls in ``system_calls.DENIED``.
"""

from __future__ import annotations

import functools
import os
import selectors
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO, Literal, NamedTuple

from grpo_kernels.rewards.system_calls import system_call_filter

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_NOBODY = 65534

# The soft limit of CPU time has a signal of its own. A program in its process group could signal the sandbox.
_LIMITED = """\
import os, resource, sys
for kind, value in zip(("CPU", "AS", "FSIZE", "NPROC", "NOFILE", "CORE"), map(int, sys.argv[1:])):
    limit = getattr(resource, "RLIMIT_" + kind)
    most = resource.getrlimit(limit)[1]
    soft = value if most == resource.RLIM_INFINITY else min(value, most)
    resource.setrlimit(limit, (soft, soft + 1 if kind == "CPU" and soft != most else soft))
os.setsid()
environment = {"HOME": "/tmp", "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin"}
os.execve(sys.executable, [sys.executable, "-I", "-X", "utf8", "/program.py"], environment)
"""


class Outcome(NamedTuple):
    """How a program ended, and what it wrote until then.

    The statuses: "ok", exit code 0; "error", another one, as after an exception (also for memory or the size of a
    file); "killed", by a signal; "cpu_time", "wall_time" and "output", more of it than allowed.
    """

    status: Literal["ok", "error", "killed", "cpu_time", "wall_time", "output"]
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Limits:
    seconds: float = 10.0  # of wall time, with the start of Python
    output_bytes: int = 2**20  # of standard output, and of standard error
    file_bytes: int = 16 * 2**20  # of the working folder
    cpu_seconds: int = 5  # of each process, as memory and files
    memory_bytes: int = 512 * 2**20  # of address space; Python takes some 30 MiB
    open_files: int = 64
    processes: int = 16  # at once, threads counted, with up to three of the sandbox

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be greater than 0, got {value}")


def run(program: str, stdin: str = "", **limits: Any) -> Outcome:
    """Runs a Python program under ``Limits``, in about a tenth of a second on top of its own time.

    Raises:
        ValueError: A limit is not positive.
        RuntimeError: Programs cannot be isolated here. Nothing has run then.
    """
    checked = Limits(**limits)
    if reason := unavailable():
        raise RuntimeError(
            "untrusted programs cannot be isolated on this machine: the executor 'bubblewrap' needs bwrap 0.8 or newer "
            "(apt-get install bubblewrap), user namespaces and, for root, a Python that the user nobody can read: "
            f'{reason}. Another executor is named as code(executor="module:function")'
        )
    return _run(program, stdin, checked)


@functools.cache
def unavailable() -> str:
    """Why programs cannot be isolated here, or an empty text: the answer of one trial, made by the first call."""
    if shutil.which("bwrap") is None:
        return "bwrap is not installed"
    try:
        outcome = _run("", "", Limits(seconds=60.0))
    except (OSError, RuntimeError) as error:
        return str(error)
    return "" if outcome.status == "ok" else f"a trial program ended with {outcome}"


def _run(program: str, stdin: str, limits: Limits) -> Outcome:
    with TemporaryFile() as source, TemporaryFile() as denied, TemporaryFile() as status:
        for file, content in ((source, program.encode(errors="replace")), (denied, system_call_filter())):
            file.write(content)
            file.seek(0)
        command = [
            *(shutil.which("bwrap"), "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent"),
            *("--clearenv", "--uid", 1000, "--gid", 1000, "--cap-drop", "ALL", "--seccomp", denied.fileno()),
            *(option for path in python_paths() for option in ("--ro-bind-try", path, path)),
            *(option for path in _DEVICES for option in ("--dev-bind", path, path)),
            *("--ro-bind-data", source.fileno(), "/program.py", "--size", limits.file_bytes, "--tmpfs", "/tmp"),
            *("--remount-ro", "/", "--chdir", "/tmp", "--json-status-fd", status.fileno(), "--"),
            *limited_python(limits),
        ]
        user = _NOBODY if os.geteuid() == 0 else None  # no limit of processes holds for root
        return execute(command, stdin, limits, status, pass_fds=(source.fileno(), denied.fileno()), user=user)


def python_paths() -> list[str]:
    """The files and folders that Python may need."""
    prefix = Path(sys.base_prefix).resolve()
    if Path.home().resolve().is_relative_to(prefix):
        raise RuntimeError(f"Python's folder {prefix} has the home folder {Path.home()} in it")
    return [*_SYSTEM, *([] if any(prefix.is_relative_to(path) for path in _SYSTEM) else [str(prefix)])]


def limited_python(limits: Limits) -> list[Any]:
    """The command, within a sandbox, that runs /program.py under those of the limits that are a process's."""
    python = os.path.realpath(os.path.join(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}"))
    numbers = (limits.cpu_seconds, limits.memory_bytes, limits.file_bytes, limits.processes, limits.open_files, 0)
    return [python, "-I", "-S", "-c", _LIMITED, *numbers]


def execute(
    command: Sequence[Any],
    stdin: str,
    limits: Limits,
    status: BinaryIO,
    pass_fds: Sequence[int],
    user: int | None = None,
) -> Outcome:
    """Runs the command of a sandbox, and kills its process group at the limits of time and output.

    It ends as the program did, with 128 and the signal's number where that was one, and has then written "exit-code" to
    the file ``status``; if it has not, there was no sandbox, and a RuntimeError says what it wrote to standard error.
    """
    with subprocess.Popen(
        [str(argument) for argument in command],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, env={}, cwd="/",
        pass_fds=(*pass_fds, status.fileno()), start_new_session=True,
        user=user, group=user, extra_groups=None if user is None else (),
    ) as process:  # fmt: skip
        writer = threading.Thread(target=_write, args=(process.stdin, stdin.encode(errors="replace")))
        writer.start()
        try:
            excess, stdout, stderr = _read(process, limits)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            writer.join()
    status.seek(0)
    code = process.returncode
    if excess is None and b"exit-code" not in status.read():
        raise RuntimeError(stderr[-500:].strip() or "the sandbox died without a report")
    ended = "ok" if code == 0 else "error" if code < 128 else "cpu_time" if code == 128 + signal.SIGXCPU else "killed"
    return Outcome(excess or ended, stdout, stderr)


def _write(stream: BinaryIO, content: bytes) -> None:
    try:
        with stream:
            stream.write(content)
    except BrokenPipeError:  # the program ended before it had read everything
        return


def _read(process: subprocess.Popen[bytes], limits: Limits) -> tuple[Literal["wall_time", "output"] | None, str, str]:
    """The limit that a process has exceeded, None if it ended before, and what it wrote until then."""
    deadline = time.monotonic() + limits.seconds
    received = {process.stdout: b"", process.stderr: b""}
    excess = None
    with selectors.DefaultSelector() as selector:
        for stream in received:
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map() and excess is None:
            for key, _ in selector.select(max(0, deadline - time.monotonic())):
                chunk = os.read(key.fd, 2**16)
                received[key.fileobj] += chunk
                if len(received[key.fileobj]) > limits.output_bytes:
                    excess = "output"
                if not chunk:
                    selector.unregister(key.fileobj)
            if time.monotonic() > deadline:
                excess = excess or "wall_time"
    try:
        if excess is None:  # it may have closed its streams and go on
            process.wait(max(0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        excess = "wall_time"
    return excess, *(text[: limits.output_bytes].decode(errors="replace") for text in received.values())
