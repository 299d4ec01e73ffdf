"""Reward for programs that pass their tests, run in a sandbox."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from grpo_kernels.rewards import bubblewrap
from grpo_kernels.rewards.program_text import extract_program
from grpo_kernels.rewards.registry import check_integer, check_number, import_function

# Runs a program and then a test in its namespace. The marker, which says that the test was reached and held, comes by
# standard input, so that neither an early exit nor the text of this script helps a program that passes no test.
_CHECK = """\
import json, os, sys, types
case = json.load(sys.stdin)
solution = sys.modules["solution"] = types.ModuleType("solution")
exec(compile(case["program"], "solution.py", "exec"), solution.__dict__)
exec(compile(case["test"], "test.py", "exec"), solution.__dict__)
os.write(1, case["marker"].encode())
"""


@dataclass(frozen=True)
class CodeReward:
    """The share of the tests that the completion's program passes, each in a sandbox of its own.

    The column ``tests`` has a list per completion, of two kinds of tests. A string is Python that raises if the
    program is wrong (assertions), run in the namespace of the program, whose ``__name__`` is then not ``__main__``.
    A mapping ``{"input": ..., "output": ...}`` is what the program reads and must print, up to white space at the ends
    of lines and of the text. Without a program the reward is 0, without tests it abstains.

    An assertion runs in one process with the program it judges: a program that exits early or prints what it likes
    gains nothing, but one that looks for the test in the interpreter's memory, or returns objects equal to
    everything, can cheat. A test by input and output has no such hole.

    Args:
        seconds: Wall time of one test.
        cpu_seconds: CPU time of each of its processes.
        memory_bytes: Address space of each of its processes.
        workers: Tests that run at once; by default one per CPU.
        executor: What runs the programs: "bubblewrap", or a function or its name as "module:function". It is called as
            ``executor(program, stdin, seconds=..., cpu_seconds=..., memory_bytes=...)`` by several threads at once and
            returns an object with ``status`` ("ok" where the program has exited with 0), ``stdout`` and ``stderr``.

    Raises:
        ValueError: A parameter is out of range; when called, a test is of neither kind.
        RuntimeError: When called, the executor cannot isolate programs on this machine.
    """

    seconds: float = 10.0
    cpu_seconds: int = 5
    memory_bytes: int = 512 * 2**20
    workers: int | None = None
    executor: str | Callable[..., Any] = "bubblewrap"

    def __post_init__(self) -> None:
        check_number("seconds", self.seconds, low=0.1)
        check_integer("cpu_seconds", self.cpu_seconds, 1)
        check_integer("memory_bytes", self.memory_bytes, 2**20)
        if self.workers is not None:
            check_integer("workers", self.workers, 1)
        self._executor()  # refuses what is none

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], *, tests: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        cases = [_checked(value, i) for i, value in enumerate(tests)]
        programs = [extract_program(c) for c in completions]
        with ThreadPoolExecutor(self.workers or os.cpu_count()) as pool:
            futures = [
                [] if program is None else [pool.submit(self._passes, program, test) for test in of_one]
                for program, of_one in zip(programs, cases, strict=True)
            ]
            passed = [sum(future.result() for future in of_one) for of_one in futures]
        return [n / len(of_one) if of_one else None for n, of_one in zip(passed, cases, strict=True)]

    def _executor(self) -> Callable[..., Any]:
        if callable(self.executor):
            return self.executor
        if self.executor == "bubblewrap":
            return bubblewrap.run
        if not isinstance(self.executor, str) or ":" not in self.executor:
            raise ValueError(f'executor must be "bubblewrap", a function or "module:function", got {self.executor!r}')
        return import_function(self.executor)

    def _passes(self, program: str, test: str | dict[str, str]) -> bool:
        execute = self._executor()
        limits = {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "memory_bytes": self.memory_bytes}
        if isinstance(test, str):
            marker = secrets.token_hex(16)
            case = json.dumps({"program": program, "test": test, "marker": marker})
            outcome = execute(_CHECK, case, **limits)
            return outcome.status == "ok" and marker in outcome.stdout
        outcome = execute(program, test["input"], **limits)
        return outcome.status == "ok" and _lines(outcome.stdout) == _lines(test["output"])


def _checked(cases: Any, index: int) -> list[str | dict[str, str]]:
    if cases is None:
        return []
    if not isinstance(cases, (list, tuple)) or not all(map(_is_test, cases)):
        raise ValueError(
            f'tests must be lists of assertions or of {{"input": str, "output": str}}, got {cases!r:.80} '
            f"for completion {index}"
        )
    return list(cases)


def _is_test(case: Any) -> bool:
    if isinstance(case, dict):
        return isinstance(case.get("input"), str) and isinstance(case.get("output"), str)
    return isinstance(case, str)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]
