"""Where there is no sandbox, or one that leaks: the reason is told and nothing runs."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess

import namespace_sandbox
import pytest

from grpo_kernels.rewards import bubblewrap, system_calls

BOTH = pytest.mark.parametrize("module", [bubblewrap, namespace_sandbox], ids=["bubblewrap", "namespaces"])


def test_there_is_a_sandbox_where_there_are_namespaces():
    """Else a mistake of ours would pass for a machine that cannot isolate, and every test be skipped."""
    if shutil.which("unshare") is None or platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("no other program here to ask for namespaces")
    probe = "unshare --user --map-root-user --mount --net --ipc --uts --pid --fork mount -t tmpfs tmpfs /proc"
    if subprocess.run(probe.split(), stderr=subprocess.DEVNULL).returncode:
        pytest.skip("the machine has no namespaces for its users")
    assert namespace_sandbox.unavailable() == ""


def test_bubblewrap_is_available_where_it_runs_this_python():
    probe = "bwrap --unshare-all --unshare-user --disable-userns --ro-bind / / --size 4096 --tmpfs /tmp"
    python = bubblewrap.limited_python(bubblewrap.Limits())[0]
    user = 65534 if os.geteuid() == 0 else None
    if (
        shutil.which("bwrap") is None
        or subprocess.run([*probe.split(), python, "-c", ""], cwd="/", user=user).returncode
    ):
        pytest.skip("no bwrap here, or none that makes namespaces and reads this Python")
    assert bubblewrap.unavailable() == ""


@BOTH
def test_nothing_runs_where_programs_cannot_be_isolated(module, monkeypatch):
    def launch(*arguments, **settings):
        raise AssertionError("a process was started")

    monkeypatch.setattr(module, "unavailable", lambda: "no user namespaces")
    monkeypatch.setattr(bubblewrap.subprocess, "Popen", launch)
    with pytest.raises(RuntimeError, match=r"cannot be isolated on this machine: .*no user namespaces"):
        module.run("print(1)")


def test_the_reason_names_the_system(monkeypatch):
    monkeypatch.setattr(namespace_sandbox.sys, "platform", "darwin")
    assert namespace_sandbox.unavailable.__wrapped__() == "the sandbox needs Linux, this is darwin"


def test_without_bwrap_the_reason_says_what_to_do(monkeypatch):
    monkeypatch.setattr(bubblewrap.shutil, "which", lambda name: None)
    monkeypatch.setattr(bubblewrap, "unavailable", bubblewrap.unavailable.__wrapped__)
    with pytest.raises(RuntimeError) as caught:
        bubblewrap.run("print(1)")
    for part in ("'bubblewrap'", "bwrap is not installed", "apt-get install bubblewrap", 'code(executor="module:'):
        assert part in str(caught.value)


def test_the_reason_is_what_bwrap_wrote(monkeypatch, tmp_path):
    bwrap = tmp_path / "bwrap"
    bwrap.write_text("#!/bin/sh\necho 'bwrap: no new namespaces' >&2\nexit 1\n")
    bwrap.chmod(0o755)
    monkeypatch.setattr(bubblewrap.os, "geteuid", lambda: 1000)  # root becomes nobody, who may not see this folder
    monkeypatch.setattr(bubblewrap.shutil, "which", lambda name: str(bwrap))
    assert bubblewrap.unavailable.__wrapped__() == "bwrap: no new namespaces"


def test_the_reason_is_what_the_kernel_refused(monkeypatch, tmp_path):
    if reason := namespace_sandbox.unavailable():
        pytest.skip(reason)
    child = tmp_path / "child.py"
    original = namespace_sandbox._CHILD.read_text()
    child.write_text(original.replace('_call("unshare", kinds)', '_call("unshare", -1)'))
    monkeypatch.setattr(namespace_sandbox, "_CHILD", child)
    assert namespace_sandbox.unavailable.__wrapped__() == "OSError: [Errno 22] unshare: Invalid argument"
    monkeypatch.setattr(namespace_sandbox, "unavailable", namespace_sandbox.unavailable.__wrapped__)
    with pytest.raises(RuntimeError, match="unshare: Invalid argument"):
        namespace_sandbox.run("print(1)")


def test_the_trial_finds_an_open_network(monkeypatch):
    if reason := namespace_sandbox.unavailable():
        pytest.skip(reason)
    monkeypatch.delitem(system_calls.DENIED, "socket")
    assert namespace_sandbox.unavailable.__wrapped__() == "a trial program had access to: network"


def test_the_trial_finds_a_missing_limit(monkeypatch):
    if reason := namespace_sandbox.unavailable():
        pytest.skip(reason)
    monkeypatch.setattr(bubblewrap, "_LIMITED", bubblewrap._LIMITED.replace('"NPROC"', '"CORE"'))
    assert namespace_sandbox.unavailable.__wrapped__() == "a trial program had access to: any number of processes"


@BOTH
def test_limits_are_checked(module):
    with pytest.raises(ValueError, match="seconds must be greater than 0, got 0"):
        module.run("", seconds=0)
    with pytest.raises(ValueError, match="memory_bytes must be greater than 0, got -1"):
        module.run("", memory_bytes=-1)
