"""How a process leaves the others that it was launched with."""

from __future__ import annotations

import gc

from torch import distributed


def end_process_group() -> None:
    """Destroys torch's process group, if there is one, with the threads that gloo has for it.

    A thread of gloo that releases a tensor while the interpreter ends aborts the process ("terminate called without an
    active exception", exit status -6). Threads end with the last reference to their group: DDP and accelerate hold it
    in cycles, which must be gone before the group is. Call it last, after a run that succeeded: it waits for
    collectives that have begun, and those of a process that failed never end. Under FSDP2, which keeps references in
    C++, gloo's threads stay.
    """
    gc.collect()
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
