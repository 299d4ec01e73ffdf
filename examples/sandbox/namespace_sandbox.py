"""An executor for ``CodeReward`` where bwrap is not at hand: a sandbox of Linux's namespaces, made by Python alone.

A recipe beside this file and ``namespace_sandbox_child.py``, or beside copies of both, names it as
``code(executor="namespace_sandbox:run")``. The other file says what a program finds, and how that is done; this one
starts it. What it shares with the package's own executor, limits and their supervision, is imported from there.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from grpo_kernels.rewards.bubblewrap import Limits, Outcome, execute, limited_python, python_paths
from grpo_kernels.rewards.system_calls import system_call_filter

_CHILD = Path(__file__).with_name("namespace_sandbox_child.py")

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


def run(program: str, stdin: str = "", **limits: Any) -> Outcome:
    """Runs a Python program under ``Limits``, in about a tenth of a second on top of its own time.

    Raises:
        ValueError: A limit is not positive.
        RuntimeError: Programs cannot be isolated here. Nothing has run then.
    """
    checked = Limits(**limits)
    if reason := unavailable():
        raise RuntimeError(f"untrusted programs cannot be isolated on this machine: {reason}")
    return _run(program, stdin, checked)


@functools.cache
def unavailable() -> str:
    """Why programs cannot be isolated here, or an empty text: the answer of one trial, made by the first call."""
    if sys.platform != "linux":
        return f"the sandbox needs Linux, this is {sys.platform}"
    limits = Limits(seconds=60.0, cpu_seconds=10)
    try:
        outcome = _run(_TRIAL, f"{limits.processes}\n", limits)
    except (OSError, RuntimeError) as error:
        return str(error)
    if outcome.status != "ok":
        return f"a trial program ended with {outcome}"
    leaks = outcome.stdout.strip()
    return f"a trial program had access to: {leaks}" if leaks else ""


def _run(program: str, stdin: str, limits: Limits) -> Outcome:
    command = [str(argument) for argument in limited_python(limits)]
    settings = {
        "program": program,
        "command": command,
        "visible": python_paths(),
        "file_bytes": limits.file_bytes,
        "system_call_filter": system_call_filter().hex(),
    }
    with TemporaryFile() as settings_file, TemporaryFile() as status:
        settings_file.write(json.dumps(settings).encode())
        settings_file.seek(0)
        child = [command[0], "-I", "-S", _CHILD, settings_file.fileno(), status.fileno()]
        return execute(child, stdin, limits, status, pass_fds=(settings_file.fileno(),))
