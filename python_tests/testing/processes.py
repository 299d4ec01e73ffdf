"""How a process that a test launched ends."""

from __future__ import annotations

import os
import sys


def end_worker() -> None:
    """Ends this process with status 0, its interpreter as it is.

    FSDP2 keeps gloo's threads, and one that releases a tensor while the interpreter ends aborts the process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
