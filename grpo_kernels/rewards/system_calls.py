"""System calls that an untrusted program may not make, as a filter for the kernel."""

from __future__ import annotations

import errno
import os
import struct

#: Sockets (AF_VSOCK has no namespace), memory that no limit counts (System V IPC, files without a name), keyrings,
#: other processes' memory, and large kernel interfaces: their numbers on x86_64 and on aarch64.
DENIED = {
    "socket": (41, 198), "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "unshare": (272, 97), "setns": (308, 268), "open_by_handle_at": (304, 265), "perf_event_open": (298, 241),
    "bpf": (321, 280), "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "memfd_create": (319, 279),
}  # fmt: skip
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of DENIED, AUDIT_ARCH


def system_call_filter() -> bytes:
    """The program for the kernel, in classic BPF, that refuses the system calls in ``DENIED``."""
    machine = os.uname().machine
    if machine not in _MACHINES:
        raise RuntimeError(f"the numbers of system calls are known for {' and '.join(_MACHINES)}, this is {machine}")
    column, architecture = _MACHINES[machine]
    load, if_equal, if_at_least, end = 0x20, 0x15, 0x35, 0x06
    count = len(DENIED)
    instructions = [
        (load, 0, 0, 4),  # the architecture
        (if_equal, 1, 0, architecture),
        (end, 0, 0, 0x80000000),  # kill
        (load, 0, 0, 0),  # the number of the call
        (if_at_least, count + 1, 0, 0x40000000),  # x86_64's second set of numbers for the same calls
        *((if_equal, count - i, 0, numbers[column]) for i, numbers in enumerate(DENIED.values())),
        (end, 0, 0, 0x7FFF0000),  # allow
        (end, 0, 0, 0x00050000 | errno.EPERM),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)
