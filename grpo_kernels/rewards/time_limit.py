"""A limit on the time of each of many calls that holds in any thread, where an alarm reaches the main thread alone."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

_AGAIN = 1.0  # seconds until an exception is raised once more, which a destructor may have swallowed


class _Overrun(BaseException):
    """Raised in the thread whose call takes too long; no ``except Exception`` on the way catches it."""


class TimeLimit:
    """Ends calls of the thread that enters it after ``seconds`` each. One thread beside it watches all of them.

    Python code is interrupted, but no single call into C. Limited calls cannot be made within each other.

    Example:
        >>> with TimeLimit(2.0) as limit:
        ...     limit.call(sum, [1, 2])
        3
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._deadline: float | None = None  # of the call that runs
        self._lock = threading.Lock()
        self._is_closed = threading.Event()

    def __enter__(self) -> TimeLimit:
        self._thread = ctypes.c_ulong(threading.get_ident())
        threading.Thread(target=self._watch, daemon=True, name="time limit").start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._is_closed.set()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function returns.

        Raises:
            TimeoutError: It took longer than the limit.
        """
        try:
            try:
                with self._lock:
                    self._deadline = time.monotonic() + self._seconds
                return function(*arguments)
            finally:
                with self._lock:
                    self._deadline = None
                ctypes.pythonapi.PyThreadState_SetAsyncExc(self._thread, None)  # one that was sent and not yet raised
        except _Overrun:
            raise TimeoutError(f"the call took more than {self._seconds} seconds") from None

    def _watch(self) -> None:
        pause = self._seconds
        while not self._is_closed.wait(pause):
            with self._lock:
                left = self._seconds if self._deadline is None else self._deadline - time.monotonic()
                if left <= 0:
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(self._thread, ctypes.py_object(_Overrun))
                    self._deadline = time.monotonic() + _AGAIN
            pause = left if left > 0 else min(_AGAIN, self._seconds)
