"""Calls outside the main thread, where no alarm interrupts them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

_WAIT = 60.0  # seconds for a thread on a busy machine


def seconds_in_a_thread(function: Callable[..., Any], *arguments: Any) -> float:
    """The processor time that a call takes in a thread of its own; infinite if it goes on."""
    seconds: list[float] = []

    def call() -> None:
        start = time.thread_time()
        function(*arguments)
        seconds.append(time.thread_time() - start)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(_WAIT)
    assert seconds or thread.is_alive(), "the call failed"
    return seconds[0] if seconds else float("inf")
