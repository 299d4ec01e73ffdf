"""A limit on the time of one call that holds in any thread, where an alarm signal reaches the main thread alone."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

_AGAIN = 1.0  # seconds until an exception is raised once more, which a destructor may have swallowed


class _Overrun(BaseException):
    """Raised in the thread whose call takes too long; no ``except Exception`` on the way catches it."""


def call_within(seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns. Interrupts Python code, in whatever thread it runs, but no single call into C.

    Raises:
        TimeoutError: The function took more than ``seconds``.
    """
    thread = ctypes.c_ulong(threading.get_ident())
    is_done = threading.Event()
    sending = threading.Lock()

    def watch() -> None:
        delay = seconds
        while not is_done.wait(delay):
            with sending:
                if not is_done.is_set():
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(_Overrun))
            delay = _AGAIN

    watcher = threading.Thread(target=watch, daemon=True, name="time limit")
    try:
        try:
            watcher.start()
            return function(*arguments)
        finally:
            with sending:
                is_done.set()
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, None)  # one that was sent and not yet raised
    except _Overrun:
        raise TimeoutError(f"the call took more than {seconds} seconds") from None
