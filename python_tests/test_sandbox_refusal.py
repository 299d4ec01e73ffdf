"""Where there is no sandbox, or one that leaks: the reason is told and nothing runs."""

from __future__ import annotations

import platform
import shutil
import subprocess

import pytest

from grpo_kernels.rewards import sandbox


def test_there_is_a_sandbox_where_there_are_namespaces():
    """Else a mistake of ours would pass for a machine that cannot isolate, and every test be skipped."""
    if shutil.which("unshare") is None or platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("no other program here to ask for namespaces")
    probe = "unshare --user --map-root-user --mount --net --ipc --uts --pid --fork mount -t tmpfs tmpfs /proc"
    if subprocess.run(probe.split(), stderr=subprocess.DEVNULL).returncode:
        pytest.skip("the machine has no namespaces for its users")
    assert sandbox.unavailable() == ""


def test_limits_are_checked(isolated):
    with pytest.raises(ValueError, match="seconds must be greater than 0, got 0"):
        sandbox.run("", seconds=0)
    with pytest.raises(ValueError, match="memory_bytes must be greater than 0, got -1"):
        sandbox.run("", memory_bytes=-1)


def test_nothing_runs_where_programs_cannot_be_isolated(monkeypatch):
    def launch(*arguments, **settings):
        raise AssertionError("a process was started")

    monkeypatch.setattr(sandbox, "unavailable", lambda: "no user namespaces")
    monkeypatch.setattr(sandbox.subprocess, "Popen", launch)
    with pytest.raises(RuntimeError, match=r"cannot be isolated on this machine: no user namespaces"):
        sandbox.run("print(1)")


def test_the_reason_names_the_system(monkeypatch):
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    assert sandbox.unavailable.__wrapped__() == "the sandbox needs Linux, this is darwin"


def test_the_reason_is_what_the_kernel_refused(isolated, monkeypatch, tmp_path):
    child = tmp_path / "child.py"
    original = sandbox._CHILD.read_text()
    child.write_text(original.replace('_call("unshare", kinds)', '_call("unshare", -1)'))
    monkeypatch.setattr(sandbox, "_CHILD", child)
    assert sandbox.unavailable.__wrapped__() == "OSError: [Errno 22] unshare: Invalid argument"
    monkeypatch.setattr(sandbox, "unavailable", sandbox.unavailable.__wrapped__)
    with pytest.raises(RuntimeError, match="unshare: Invalid argument"):
        sandbox.run("print(1)")


@pytest.mark.parametrize(
    ("weakened", "leak"),
    [
        ('"socket": (41, 198), ', "network"),
        ("(resource.RLIMIT_NPROC, limits", "any number of processes"),
    ],
)
def test_the_trial_finds_a_sandbox_that_leaks(isolated, monkeypatch, tmp_path, weakened, leak):
    child = tmp_path / "child.py"
    original = sandbox._CHILD.read_text()
    assert weakened in original
    child.write_text(original.replace(weakened, "(resource.RLIMIT_CORE, limits" if "RLIMIT" in weakened else ""))
    monkeypatch.setattr(sandbox, "_CHILD", child)
    assert sandbox.unavailable.__wrapped__() == f"a trial program had access to: {leak}"
