"""The inside of the sandbox: a script that isolates itself and then becomes an untrusted program.

``sandbox.py`` runs it, with the standard library alone. It has three processes:

- the *outside* process enters new user, mount, pid, network, IPC and host name namespaces, and waits;
- the *first* process of the pid namespace builds a file system, gives up every privilege and waits. When it dies, the
  kernel kills whatever is left in the namespace: to end a program, the outside process kills the first;
- the *program* is a new Python, which finds:

  - a file system of its own, with Python and the system's libraries, read only; no home, no configuration, no /proc.
    The only place to write is its working folder, /tmp, which is empty, in memory and of limited size;
  - no network: not even a system call that makes a socket, and none of the calls in ``_DENIED``;
  - an identity that is nobody outside (the parent's, where the parent is not root), no capability, and no way to
    one: no set-uid, no user namespace (which the kernel refuses in a chroot);
  - no process but its descendants, no file descriptor but 0, 1 and 2, no environment of the parent's;
  - limits on CPU time, address space, files and processes.

The settings come by standard input, before the program's own. What happened goes, as lines of JSON, to the file
descriptor that the first argument names: {"exit": code}, {"signal": number} or {"refused": why}.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any

_INSIDE = 1000  # user and group in the sandbox
_NOBODY = 65534  # and what root maps them to: no limit of processes holds for root itself

_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 0x1, 0x2, 0x4
_AT_FDCWD, _AT_RECURSIVE, _MNT_DETACH = -100, 0x8000, 0x2
_NR_MOUNT_SETATTR = 442  # the same on every architecture; Linux 5.12
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
_CAPABILITY_VERSION_3 = 0x20080522

# System calls that reach past namespaces, mounts and limits: sockets (AF_VSOCK has no namespace), memory that no limit
# counts (System V IPC, files without a name), keyrings, other processes' memory, and large kernel interfaces that a
# program under test has no use for. Numbers on x86_64 and on aarch64.
_DENIED = {
    "socket": (41, 198), "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "unshare": (272, 97), "setns": (308, 268), "open_by_handle_at": (304, 265), "perf_event_open": (298, 241),
    "bpf": (321, 280), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "memfd_create": (319, 279),
}  # fmt: skip
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of _DENIED, AUDIT_ARCH
_X32_CALLS = 0x40000000  # x86_64's second set of numbers for the same calls starts here
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # instructions of the filter
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
_libc.prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong]


def outside(status_fd: int) -> None:
    """Enters the namespaces, lets the first process run the program, and kills it on SIGTERM."""
    _write("/proc/self/oom_score_adj", "1000")  # where memory runs out, the sandbox goes first
    settings = _read_settings()
    os.umask(0o022)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _enter_namespaces(status_fd)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    awaited = {signal.SIGTERM, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    first_pid = os.fork()
    if first_pid == 0:
        _or_refuse(status_fd, first, settings, status_fd)
        os._exit(0)
    if signal.sigwait(awaited) == signal.SIGTERM:
        os.kill(first_pid, signal.SIGKILL)
    _, status = os.waitpid(first_pid, 0)
    if os.WIFSIGNALED(status):
        _report(status_fd, {"signal": os.WTERMSIG(status)})


def first(settings: dict[str, Any], status_fd: int) -> None:
    """Isolates the first process of the pid namespace, starts the program and reports how it ended."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _build_files(settings)
    _give_up_privileges()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # the change of identity has cleared it
    program_pid = os.fork()
    if program_pid == 0:
        _or_refuse(status_fd, _become_program, settings)
    pid = 0
    while pid != program_pid:
        pid, status = os.wait()  # the program's orphans come here, too
    if os.WIFSIGNALED(status):
        _report(status_fd, {"signal": os.WTERMSIG(status)})
    else:
        _report(status_fd, {"exit": os.WEXITSTATUS(status)})


def _read_settings() -> dict[str, Any]:
    """The settings from standard input, byte for byte: what follows is the program's."""
    (size,) = struct.unpack("!Q", _read_exactly(8))
    return json.loads(_read_exactly(size))


def _read_exactly(size: int) -> bytes:
    parts = []
    while size:
        part = os.read(0, size)
        if not part:
            raise EOFError("standard input ended in the settings")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _enter_namespaces(status_fd: int) -> None:
    entered_read, entered_write = os.pipe()
    entering = os.getpid()
    mapper = os.fork()
    if mapper == 0:  # stays outside: who maps users must have them
        os.close(entered_write)
        if os.read(entered_read, 1):
            _or_refuse(status_fd, _map_users, entering)
        os._exit(0)
    kinds = _CLONE_NEWUSER | _CLONE_NEWNS | _CLONE_NEWPID | _CLONE_NEWNET | _CLONE_NEWIPC | _CLONE_NEWUTS
    _call("unshare", kinds)
    os.write(entered_write, b"!")
    _, status = os.waitpid(mapper, 0)
    if status:
        os._exit(1)  # it has reported why


def _map_users(pid: int) -> None:
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0 and _has_nobody():  # root builds the sandbox, nobody lives in it
        for kind in ("uid", "gid"):
            _write(f"/proc/{pid}/{kind}_map", f"0 0 1\n{_INSIDE} {_NOBODY} 1\n")
        return
    _write(f"/proc/{pid}/setgroups", "deny")  # what the kernel demands of who may map no group but its own
    _write(f"/proc/{pid}/uid_map", f"{_INSIDE} {uid} 1\n")
    _write(f"/proc/{pid}/gid_map", f"{_INSIDE} {gid} 1\n")


def _has_nobody() -> bool:
    """Whether there is a user to map to; a container's root may be all there is, and is no root outside then."""
    with open("/proc/self/uid_map") as file:
        ranges = [[int(number) for number in line.split()] for line in file]
    return any(inside <= _NOBODY < inside + count for inside, _, count in ranges)


def _build_files(settings: dict[str, Any]) -> None:
    """Puts a file system of what the program may see in the place of the machine's."""
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    top = "/proc"  # a folder that is there on every machine, and that nothing visible is in
    root = f"{top}/root"
    _mount("tmpfs", top, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755")
    os.makedirs(f"{root}/tmp")
    for path in settings["visible"]:
        _show(path, root, _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV)
    for device in ("null", "zero", "random", "urandom"):
        _show(f"/dev/{device}", root, _ATTR_RDONLY | _ATTR_NOSUID)
    with open(f"{root}/program.py", "wb") as file:
        file.write(settings["program"].encode(errors="replace"))
    size = settings["limits"]["file_bytes"]
    options = f"size={size},nr_inodes=4096,mode=700,uid={_INSIDE},gid={_INSIDE}"
    _mount("tmpfs", f"{root}/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, options)
    _restrict(top, _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV, 0)
    os.chdir(top)
    _call("pivot_root", b".", b".")
    _call("umount2", b".", _MNT_DETACH)  # the machine's file system, which pivot_root has put on top
    os.chroot("root")
    os.chdir("/tmp")


def _show(path: str, root: str, attributes: int) -> None:
    """Makes a folder, file or symbolic link of the machine visible under ``root``; what is not there is left out."""
    if not os.path.lexists(path):
        return
    target = root + path
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        open(target, "xb").close()
    _mount(path, target, None, _MS_BIND | _MS_REC)
    _restrict(target, attributes, _AT_RECURSIVE)


def _restrict(path: str, attributes: int, flags: int) -> None:
    request = struct.pack("=4Q", attributes, 0, 0, 0)
    number, size = ctypes.c_long(_NR_MOUNT_SETATTR), ctypes.c_size_t(len(request))
    _call("syscall", number, _AT_FDCWD, path.encode(), flags, request, size, about=f"mount_setattr {path}")


def _give_up_privileges() -> None:
    capability = 0
    while _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
        capability += 1
    if ctypes.get_errno() != errno.EINVAL:  # that is: beyond the last one
        raise OSError(ctypes.get_errno(), "dropping capabilities")
    if os.getuid() != _INSIDE:
        os.setgroups([])
    os.setresgid(_INSIDE, _INSIDE, _INSIDE)
    os.setresuid(_INSIDE, _INSIDE, _INSIDE)
    _call("capset", (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)())
    _prctl(_PR_SET_DUMPABLE, 0)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _filter_system_calls(os.uname().machine)


def _filter_system_calls(machine: str) -> None:
    if machine not in _MACHINES:
        raise RuntimeError(f"the numbers of system calls are known for {' and '.join(_MACHINES)}, this is {machine}")
    column, architecture = _MACHINES[machine]
    numbers = [calls[column] for calls in _DENIED.values()]
    after = len(numbers)
    instructions = [
        (_LOAD, 0, 0, 4),  # the architecture
        (_IF_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),  # the number of the call
        (_IF_AT_LEAST, after + 1, 0, _X32_CALLS),
        *((_IF_EQUAL, after - i, 0, number) for i, number in enumerate(numbers)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *i) for i in instructions))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(instructions), ctypes.addressof(code)))
    _prctl(_PR_SET_SECCOMP, 2, ctypes.addressof(program))


def _become_program(settings: dict[str, Any]) -> None:
    os.setsid()  # out of the parent's process group, which it could signal
    limits = settings["limits"]
    for kind, value in (
        (resource.RLIMIT_CPU, limits["cpu_seconds"]),
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NPROC, limits["processes"]),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_CORE, 0),
    ):
        _, most = resource.getrlimit(kind)
        soft = value if most == resource.RLIM_INFINITY else min(value, most)
        grace = 1 if kind == resource.RLIMIT_CPU and soft != most else 0  # the soft limit's signal says why it ends
        resource.setrlimit(kind, (soft, soft + grace))
    python = settings["python"]
    environment = {"HOME": "/tmp", "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin"}
    os.execve(python, [python, "-I", "-X", "utf8", "/program.py"], environment)


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    arguments = [None if text is None else text.encode() for text in (source, target, kind, options)]
    _call("mount", *arguments[:3], flags, arguments[3], about=target)


def _prctl(option: int, value: int, address: int = 0) -> None:
    _call("prctl", option, value, address, 0, 0)


def _call(name: str, *arguments: Any, about: str = "") -> None:
    if getattr(_libc, name)(*arguments) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name} {about}".strip() + f": {os.strerror(code)}")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _report(status_fd: int, report: dict[str, Any]) -> None:
    os.write(status_fd, json.dumps(report).encode() + b"\n")


def _or_refuse(status_fd: int, step: Callable[..., None], *arguments: Any) -> None:
    """Runs a step; an exception ends this process, reported as the reason why there is no sandbox."""
    try:
        step(*arguments)
    except Exception as error:
        _report(status_fd, {"refused": f"{type(error).__name__}: {error}"})
        os._exit(1)


if __name__ == "__main__":
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)
    _or_refuse(descriptor, outside, descriptor)
