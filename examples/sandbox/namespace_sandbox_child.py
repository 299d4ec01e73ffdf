"""The inside of the sandbox: a script that isolates itself and then becomes an untrusted program.

``namespace_sandbox.py`` runs it, with the standard library alone. It has three processes:

- the *outside* process enters new user, mount, pid, network, IPC and host name namespaces, and waits;
- the *first* process of the pid namespace builds a file system, gives up every privilege and waits. When it dies, the
  kernel kills whatever is left in the namespace. The two are one process group, by which they are killed;
- the *program* is a new Python, which finds:

  - a file system of its own, with Python and the system's libraries, read only; no home, no configuration, no /proc.
    The only place to write is its working folder, /tmp, which is empty, in memory and of limited size;
  - no network: not even a system call that makes a socket, and none of the calls that the filter refuses;
  - an identity that is nobody outside (the parent's, where the parent is not root), no capability, and no way to
    one: no set-uid, no user namespace (which the kernel refuses in a chroot);
  - no process but its descendants, no file descriptor but 0, 1 and 2, no environment of the parent's;
  - limits on CPU time, address space, files and processes.

The arguments are two file descriptors: of the settings, in JSON, and of where to write "exit-code" when the program has
ended. Why there is no sandbox goes to standard error.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
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

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
_libc.prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong]


def outside(settings: dict[str, Any], status_fd: int) -> None:
    """Enters the namespaces, lets the first process run the program, and ends as that does."""
    _write("/proc/self/oom_score_adj", "1000")  # where memory runs out, the sandbox goes first
    os.umask(0o022)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _enter_namespaces()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    first_pid = os.fork()
    if first_pid == 0:
        _or_refuse(first, settings, status_fd)
    _, status = os.waitpid(first_pid, 0)
    if os.WIFSIGNALED(status):  # it could write nothing
        os.write(status_fd, b"exit-code")
    os._exit(_exit_code(status))


def first(settings: dict[str, Any], status_fd: int) -> None:
    """Isolates the first process of the pid namespace, starts the program and ends as that does."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _build_files(settings)
    _give_up_privileges(bytes.fromhex(settings["system_call_filter"]))
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # the change of identity has cleared it
    program_pid = os.posix_spawn(settings["command"][0], settings["command"], {})
    pid = 0
    while pid != program_pid:
        pid, status = os.wait()  # the program's orphans come here, too
    os.write(status_fd, b"exit-code")
    os._exit(_exit_code(status))


def _exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _enter_namespaces() -> None:
    entered_read, entered_write = os.pipe()
    entering = os.getpid()
    mapper = os.fork()
    if mapper == 0:  # stays outside: who maps users must have them
        os.close(entered_write)
        if os.read(entered_read, 1):
            _or_refuse(_map_users, entering)
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
    options = f"size={settings['file_bytes']},nr_inodes=4096,mode=700,uid={_INSIDE},gid={_INSIDE}"
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


def _give_up_privileges(system_call_filter: bytes) -> None:
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
    code = ctypes.create_string_buffer(system_call_filter)
    program = ctypes.create_string_buffer(struct.pack("@HP", len(system_call_filter) // 8, ctypes.addressof(code)))
    _prctl(_PR_SET_SECCOMP, 2, ctypes.addressof(program))


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


def _or_refuse(step: Callable[..., None], *arguments: Any) -> None:
    """Runs a step; an exception ends this process, with the reason why there is no sandbox on standard error."""
    try:
        step(*arguments)
    except Exception as error:
        os.write(2, f"{type(error).__name__}: {error}".encode())
        os._exit(1)


if __name__ == "__main__":
    settings_fd, status_fd = map(int, sys.argv[1:])
    os.set_inheritable(status_fd, False)
    with open(settings_fd, "rb") as settings_file:
        settings = json.load(settings_file)
    _or_refuse(outside, settings, status_fd)
