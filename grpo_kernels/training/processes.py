"""How a process leaves the others that it was launched with."""

from __future__ import annotations

import gc

from torch import distributed

if distributed.is_available():
    # Its functions have the process group of the time of their import as a default, which would keep it for good.
    import torch.distributed.nn.functional  # noqa: F401


def end_process_group() -> None:
    """Destroys torch's process group, if there is one, with the threads that gloo has for it.

    A thread of gloo that releases a tensor while the interpreter ends aborts the process ("terminate called without an
    active exception", exit status -6). Threads end with the last reference to their group: DDP and accelerate hold it
    in cycles, which must be gone before the group is. Import this module before the group is made, and call it last,
    after a run that succeeded: it waits for collectives that have begun, and those of a process that failed never end.
    FSDP2 keeps references in C++, so that under it gloo's threads stay.
    """
    gc.collect()
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
