"""The sandboxes: what a program may do in it, and that nothing which it tries beyond that has an effect."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

# A program starts with this, so that its processes can be found from outside, where their names are seen.
NAMED = """
import ctypes, os, sys, time
ctypes.CDLL(None).prctl(15, b"{name}", 0, 0, 0)
"""


@pytest.fixture
def name():
    return f"box{uuid.uuid4().hex[:11]}"  # the kernel keeps 15 characters


def processes_named(name: str) -> list[str]:
    found = []
    for status in Path("/proc").glob("[0-9]*/comm"):
        try:
            if status.read_text().strip() == name:
                found.append(status.parent.name)
        except (FileNotFoundError, ProcessLookupError):  # gone since it was listed
            continue
    return found


def status_of(pid: str) -> dict[str, str]:
    lines = Path("/proc", pid, "status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def gone(name: str) -> bool:
    """Whether no process of this name is left, within half a minute: what is killed may take a moment to go."""
    deadline = time.monotonic() + 30
    while processes_named(name):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_a_program_reads_writes_and_ends(sandbox):
    outcome = sandbox.run("import sys\nprint(input()[::-1])\nprint('no', file=sys.stderr)", "abc\n")
    assert outcome == ("ok", "cba\n", "no\n")
    assert sandbox.run("raise SystemExit(3)").status == "error"
    failed = sandbox.run("1 / 0")
    assert failed.status == "error" and failed.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert sandbox.run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)").status == "killed"


def test_input_and_text_arrive_as_they_are(sandbox):
    long = "é漢\n" * 200_000
    assert sandbox.run("import sys; print(len(sys.stdin.read()), 'é漢')", long) == ("ok", f"{len(long)} é漢\n", "")
    assert sandbox.run("print('unread')", long) == ("ok", "unread\n", "")
    assert sandbox.run("print('\ud800' == '?')").stdout == "True\n"  # half a character of UTF-16 is no text


def test_what_programs_need_is_there(sandbox):
    program = """
import asyncio, ctypes, decimal, hashlib, json, math, random, sqlite3, subprocess, sys, tempfile, threading, zlib
async def one(): return 1
assert asyncio.run(one()) == 1
assert subprocess.run([sys.executable, "-c", "print(2)"], capture_output=True, text=True).stdout == "2\\n"
thread = threading.Thread(target=lambda: print(3)); thread.start(); thread.join()
with tempfile.TemporaryFile() as file: file.write(b"x" * 1000)
open("note.txt", "w").write("kept"); assert open("/tmp/note.txt").read() == "kept"
open("/dev/null", "w").write("x"); assert len(open("/dev/urandom", "rb").read(4)) == 4
print(sys.version_info[:2], __name__)
"""
    assert sandbox.run(program) == ("ok", f"3\n{sys.version_info[:2]} __main__\n", "")


def test_each_program_starts_in_an_empty_folder(sandbox):
    program = "import os; print(os.getcwd(), os.listdir('.')); open('left.txt', 'w').write('x')"
    assert [sandbox.run(program).stdout for _ in range(2)] == ["/tmp []\n"] * 2


def test_programs_run_at_once(sandbox):
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda i: sandbox.run("print(input())", str(i)), range(12)))
    assert [outcome.stdout for outcome in outcomes] == [f"{i}\n" for i in range(12)]


def test_a_socket_reaches_nobody(sandbox):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        program = f"import socket; socket.create_connection(('127.0.0.1', {listener.getsockname()[1]}), timeout=1)"
        outcome = sandbox.run(program)
        with pytest.raises(TimeoutError):
            listener.accept()
    assert outcome.status == "error" and "PermissionError" in outcome.stderr


def test_no_kind_of_socket_can_be_made(sandbox):
    outcome = sandbox.run("""
import socket
for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, 40):  # 40: AF_VSOCK
    try:
        socket.socket(family, socket.SOCK_STREAM)
        print("made", family)
    except PermissionError:
        pass
print("done")
""")
    assert outcome == ("ok", "done\n", "")


def test_nothing_outside_the_folder_is_written(sandbox, tmp_path):
    mark = f"escaped-{uuid.uuid4().hex}"
    package = Path(sandbox.__file__).parent
    places = [tmp_path, Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"), Path.home(), Path(sys.base_prefix), package]
    (tmp_path / "precious").write_text("whole")
    outcome = sandbox.run(f"""
import os, shutil
for place in {[str(place) for place in places]} + ["/", "/usr", "/usr/lib", "/dev"]:
    for attempt in (lambda: os.makedirs(place), lambda: open(place + "/{mark}", "w").write("x")):
        try:
            attempt()
        except OSError:
            continue
shutil.rmtree({str(tmp_path)!r}, ignore_errors=True)
print(os.path.exists("/tmp/{mark}"))
""")
    assert outcome == ("ok", "True\n", "")  # its own /tmp, which is gone
    assert not [place for place in [*places, Path("/"), Path("/usr"), Path("/dev")] if (place / mark).exists()]
    assert (tmp_path / "precious").read_text() == "whole"


def test_everything_but_the_folder_is_read_only(sandbox):
    outcome = sandbox.run("""
import os, sys
for place in ("/", "/dev", "/usr", "/usr/lib", sys.prefix, os.__file__, "/program.py", "/tmp"):
    if not os.statvfs(place).f_flag & os.ST_RDONLY:
        print(place)
try:
    os.utime("/dev/null", (0, 0))
    print("/dev/null")
except OSError:
    pass
""")
    assert outcome == ("ok", "/tmp\n", "")


def test_every_namespace_is_another_and_its_first_process_has_no_privileges(sandbox, name):
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(sandbox.run, NAMED.format(name=name) + "time.sleep(1000)", seconds=60.0)
        while not (found := processes_named(name)) and not running.done():
            time.sleep(0.01)
        inside, outside = Path("/proc", found[0], "ns"), Path("/proc/self/ns")
        kinds = ("user", "mnt", "pid", "net", "ipc", "uts")
        assert [kind for kind in kinds if (inside / kind).readlink() == (outside / kind).readlink()] == []
        first = status_of(status_of(found[0])["PPid"])
        os.kill(int(found[0]), signal.SIGKILL)
    assert running.result().status == "killed"
    assert first["NSpid"].split()[-1] == "1"
    assert {int(first[kind], 16) for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert (first["NoNewPrivs"], first["Seccomp"]) == ("1", "2")


def test_files_of_the_machine_are_not_there(sandbox, tmp_path):
    (tmp_path / "secret").write_text("key")
    hidden = [str(tmp_path / "secret"), "/etc/passwd", "/proc/self", "/proc/1", "/sys/kernel", "/run", "/var", "/home"]
    outcome = sandbox.run(f"import os; print([path for path in {hidden} if os.path.exists(path)])")
    assert outcome == ("ok", "[]\n", "")
    home = str(Path.home())
    listing = sandbox.run(f"import os; print(os.listdir({home!r}) if os.path.exists({home!r}) else [])").stdout
    way_to_python = Path(sys.base_prefix).resolve()
    expected = [way_to_python.relative_to(home).parts[0]] if way_to_python.is_relative_to(home) else []
    assert listing == f"{expected}\n"


def test_the_parents_environment_and_files_stay_with_it(sandbox, monkeypatch, tmp_path):
    monkeypatch.setenv("API_KEY", "hunter2")
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        outcome = sandbox.run("""
import os
for number in range(3, 256):
    try:
        print("open:", number, os.fstat(number))
    except OSError:
        pass
print(sorted(os.environ))
""")
    assert outcome == ("ok", "['HOME', 'LANG', 'PATH']\n", "")


def test_a_fork_bomb_is_limited_and_swept_away(sandbox, name):
    bomb = NAMED.format(name=name) + "while True:\n    try: os.fork()\n    except OSError: time.sleep(0.01)"
    seen = []
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(sandbox.run, bomb, seconds=3.0, processes=10)
        while not running.done():
            seen.append(len(processes_named(name)))
            time.sleep(0.02)
    assert running.result().status == "wall_time"
    assert 2 <= max(seen) <= 10
    assert gone(name)


def test_memory_is_limited(sandbox):
    program = "x = bytearray({} * 2**20); print(len(x) >> 20)"
    assert sandbox.run(program.format(64), memory_bytes=2**28) == ("ok", "64\n", "")
    outcome = sandbox.run(program.format(300), memory_bytes=2**28)
    assert outcome.status == "error" and "MemoryError" in outcome.stderr


def test_memory_that_is_no_address_space_is_refused(sandbox):
    outcome = sandbox.run("""
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
print(libc.shmget(0, ctypes.c_size_t(1 << 30), 0o600), ctypes.get_errno() == errno.EPERM)
""")
    assert outcome == ("ok", "-1 True\n", "")


@pytest.mark.parametrize("file_count", [1, 32])
def test_files_are_limited_one_by_one_and_together(sandbox, file_count):
    outcome = sandbox.run(
        f"""
import os
for i in range({file_count}):
    try:
        with open(f"{{i}}", "wb", buffering=0) as file:
            for _ in range(64 // {file_count}):
                file.write(b"x" * 2**20)
    except OSError as error:
        print(error.strerror)
        break
print(sum(os.path.getsize(f) for f in os.listdir(".")) <= 4 * 2**20)
""",
        file_bytes=4 * 2**20,
    )
    assert outcome == ("ok", f"{'File too large' if file_count == 1 else 'No space left on device'}\nTrue\n", "")


def test_endless_output_ends_the_program(sandbox, name):
    start = time.monotonic()
    for stream in ("stdout", "stderr"):
        program = NAMED.format(name=name) + f"while True: sys.{stream}.write('x' * 1000)"
        outcome = sandbox.run(program, seconds=30.0, output_bytes=10_000)
        assert outcome.status == "output"
        assert getattr(outcome, stream) == "x" * 10_000
    assert time.monotonic() - start < 20
    assert gone(name)


def test_sleeping_and_spinning_for_ever_are_two_ways_to_end(sandbox, name):
    start = time.monotonic()
    asleep = sandbox.run(NAMED.format(name=name) + "print('z', flush=True); time.sleep(1000)", seconds=3.0)
    assert asleep == ("wall_time", "z\n", "")
    assert time.monotonic() - start < 8.0
    assert sandbox.run(NAMED.format(name=name) + "while True: pass", seconds=30.0, cpu_seconds=1).status == "cpu_time"
    assert gone(name)


def test_a_program_that_ignores_every_signal_is_ended(sandbox, name):
    stubborn = """
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass
"""
    assert sandbox.run(NAMED.format(name=name) + stubborn, seconds=1.0).status == "wall_time"
    assert sandbox.run(NAMED.format(name=name) + stubborn, seconds=30.0, cpu_seconds=1).status == "killed"
    assert gone(name)


def test_no_process_outside_can_be_killed(sandbox):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as bystander:
        outcome = sandbox.run(f"""
import os, signal
assert (os.getpid(), os.getppid()) == (2, 1)  # before anything is sent to -1
assert os.getpgrp() == 2  # what is sent to 0 goes no further
for pid in (1, {os.getpid()}, {os.getppid()}, {bystander.pid}, -{os.getpgrp()}, -{bystander.pid}):
    try:
        os.kill(pid, signal.SIGKILL)
        print("sent to", pid)
    except OSError:
        pass
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.kill(0, signal.SIGTERM)
try:
    os.kill(-1, signal.SIGKILL)
except ProcessLookupError:
    print("nobody else here")
""")
        assert bystander.poll() is None
        bystander.communicate(b"\n")
    assert outcome == (
        "ok",
        "sent to 1\nnobody else here\n",
        "",
    )  # the namespace's first process takes no signal from within


def test_a_daemon_does_not_outlive_its_program(sandbox, name, tmp_path):
    daemon = """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for number in (0, 1, 2): os.close(number)
        time.sleep(60)
    os._exit(0)
time.sleep(1)
print("left it behind")
"""
    seen = []
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(sandbox.run, NAMED.format(name=name) + daemon)
        while not running.done():
            seen.append(len(processes_named(name)))
            time.sleep(0.02)
    assert running.result() == ("ok", "left it behind\n", "")
    assert max(seen) >= 2
    assert gone(name)


def test_a_program_dies_with_the_process_that_runs_it(sandbox, name):
    program = NAMED.format(name=name) + "time.sleep(1000)"
    runner = f"import sys; sys.path[:] = {sys.path}; import {sandbox.__name__} as s; s.run({program!r}, seconds=1000.0)"
    with subprocess.Popen([sys.executable, "-c", runner]) as parent:
        deadline = time.monotonic() + 30
        while not processes_named(name) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(processes_named(name)) == 1
        parent.kill()
    assert gone(name)


def test_no_privilege_is_left_or_can_be_had(sandbox):
    outcome = sandbox.run("""
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
libc.mount.argtypes = [ctypes.c_char_p] * 3 + [ctypes.c_ulong, ctypes.c_char_p]
def refused(result, *errors):
    return result == -1 and ctypes.get_errno() in (errno.EPERM, *errors)
attempts = {
    "remount": refused(libc.mount(None, b"/", None, 0x1000 | 0x20, None)),
    "mount": refused(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, None)),
    "unmount": refused(libc.umount2(b"/tmp", 2)),
    "chroot": refused(libc.chroot(b"/usr")),
    "unshare": refused(libc.unshare(0x10000000)),
    # clone, which the filter lets pass, as a process without threads and with a user namespace of its own: one too many
    "clone": refused(libc.syscall(ctypes.c_long({"x86_64": 56, "aarch64": 220}[os.uname().machine]),
                                  ctypes.c_ulong(0x10000000 | 17), None, None, None, None), errno.ENOSPC),
    "ptrace": refused(libc.ptrace(16, 1, None, None)),
    "file in memory": refused(libc.memfd_create(b"file", 0)),
    "setuid": libc.setuid(0) == -1,
    "privileges by exec": libc.prctl(39, 0, 0, 0, 0) == 1,
    "bounding set": not any(libc.prctl(23, capability, 0, 0, 0) for capability in range(38)),
}
sets = (ctypes.c_uint32 * 6)()
libc.capget((ctypes.c_uint32 * 2)(0x20080522, 0), sets)
attempts["capabilities"] = not any(sets)
print([name for name, held in attempts.items() if not held])
""")
    assert outcome == ("ok", "[]\n", "")
