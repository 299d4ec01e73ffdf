"""Timing rivals in turns, so that a machine's drift hits all alike; ratios and medians, never a time alone."""

from __future__ import annotations

import itertools
import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from records import Row

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

Step = Callable[[], object]


@dataclass
class Comparison:
    """Several ways to do the same work, and what was measured of them.

    Args:
        work: Its short name.
        title: The work, its shapes and dtype.
        floor: Which of the names is the floor that the others are held against.
        shape: By letter.
        dtype: Of the logits, or of hidden states and head.
        live: Share of the rows that have a gradient.
        operations, bytes: What the floor's work takes.
        targets: Highest share of the floor that a name is meant to reach.
        contenders: What to time, by name, the floor first.
        prepare: By name, what to do before each timing of it, untimed.
        notes: What else was measured.
        times: In seconds.
        peaks: Most bytes that a name allocated beyond its inputs.
        errors: What a name is off by.
        versions: Of a name's package.
        refused: Names that are not timed, with their status and the reason.
    """

    work: str
    title: str
    floor: str
    shape: dict[str, int] = field(default_factory=dict)
    dtype: str = "float32"
    live: float = 1.0
    operations: float | None = None
    bytes: float | None = None
    targets: dict[str, float] = field(default_factory=dict)
    contenders: dict[str, Step] = field(default_factory=dict)
    prepare: dict[str, Step] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    times: dict[str, list[float]] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    refused: dict[str, tuple[str, str]] = field(default_factory=dict)

    def median(self, name: str) -> float:
        return statistics.median(self.times[name])

    def over_floor(self, name: str) -> float:
        return self.median(name) / self.median(self.floor)

    def spread(self, name: str) -> tuple[float, float]:
        """The 20th and the 80th percentile."""
        ordered = sorted(self.times[name])
        return ordered[len(ordered) // 5], ordered[-1 - len(ordered) // 5]

    def rows(self) -> list[Row]:
        """One of each name in the contenders' order, the refused ones last."""
        common = {"work": self.work, "title": self.title, "shape": self.shape, "dtype": self.dtype}
        common |= {"live": self.live, "floor": self.floor, "operations": self.operations, "bytes": self.bytes}
        rows = []
        for name in (name for name in self.contenders if self.times.get(name)):
            low, high = self.spread(name)
            found = {"median_ms": self.median(name) * 1e3, "p20_ms": low * 1e3, "p80_ms": high * 1e3}
            found |= {"rounds": len(self.times[name]), "over_floor": self.over_floor(name)}
            found |= {"asked": self.targets.get(name), "peak_bytes": self.peaks.get(name)}
            found |= {"errors": self.errors.get(name, {}), "version": self.versions.get(name, "")}
            rows.append(Row(**common, provider=name, **found))
        for name, (status, reason) in self.refused.items():
            found = {"errors": self.errors.get(name, {}), "version": self.versions.get(name, "")}
            rows.append(Row(**common, provider=name, status=status, reason=reason, **found))
        return rows


@contextmanager
def in_turns(comparison: Comparison, device: torch.device) -> Iterator[Callable[[str], None]]:
    """A function that times one name once, after all were warmed up by one run; a name that fails leaves the turns.

    On a GPU: by the device's clock, with the preparation queued before so that the host is ahead, and the cache
    filled with something else between one name and the next.
    """
    on_gpu = device.type == "cuda"
    flush = torch.zeros(_CACHE_BYTES // 8, dtype=torch.int64, device=device) if on_gpu else None

    def attempt(name: str, timed: Callable[[Step], float]) -> float | None:
        if name in comparison.refused:
            return None
        try:
            comparison.prepare.get(name, lambda: None)()
            if flush is not None:
                flush.sum()  # read, not written: what is timed would write the lines back
            return timed(comparison.contenders[name])
        except Exception as error:  # of whatever kind: it is this name's row, and the others go on
            if name == comparison.floor:
                raise
            traceback.print_exc()
            comparison.refused[name] = failure(error)
            comparison.times.pop(name, None)
            return None

    def once(name: str) -> None:
        found = attempt(name, partial(_timed, device=device))
        if found is not None:
            comparison.times.setdefault(name, []).append(found)

    for name in comparison.contenders:
        peak = attempt(name, partial(_peak, device=device))
        if on_gpu and peak is not None:
            comparison.peaks[name] = int(peak)
    comparison.times = {}
    yield once


_CACHE_BYTES = 1 << 28  # more than a GPU's L2
_AHEAD_CYCLES = 2_000_000  # about a millisecond in which the host queues what is timed


def failure(error: Exception) -> tuple[str, str]:
    """A row's status and reason."""
    is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    first_line = (str(error).strip() or "no message").splitlines()[0]
    return "out of memory" if is_memory else "failed", f"{type(error).__name__}: {first_line}"[:300]


def _timed(step: Step, device: torch.device) -> float:
    """Of one run, whose results are freed after the clock stops."""
    if device.type != "cuda":
        start = time.perf_counter()
        results = step()
        seconds = time.perf_counter() - start
        del results
        return seconds
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(_AHEAD_CYCLES)
    first.record()
    results = step()
    last.record()
    last.synchronize()
    del results
    return first.elapsed_time(last) / 1e3


def _peak(step: Step, device: torch.device) -> float:
    """Runs it twice, the first to warm up; bytes of the CUDA allocator on a GPU, else 0."""
    if device.type != "cuda":
        step()
        return 0
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def compare(benchmark: BenchmarkFixture, comparison: Comparison, rounds: int) -> None:
    """Times every contender once a round on the CPU, the order turned by one each time, pytest-benchmark the last."""
    *others, ours = comparison.contenders
    turn = itertools.count()
    with in_turns(comparison, torch.device("cpu")) as once:

        def before_round() -> None:
            first = next(turn) % len(others)
            for name in others[first:] + others[:first]:
                once(name)

        benchmark.pedantic(lambda: once(ours), setup=before_round, rounds=rounds)
    found = {f"{name} over floor": round(comparison.over_floor(name), 3) for name in comparison.times}
    benchmark.extra_info.update(found)


def time_in_turns(comparison: Comparison, rounds: int, device: torch.device, deadline: float = math.inf) -> Comparison:
    """The same without pytest-benchmark, on any device; after ``deadline``, of ``time.monotonic``, no round begins."""
    names = list(comparison.contenders)
    with in_turns(comparison, device) as once:
        for turn in range(rounds):
            if turn and time.monotonic() > deadline:
                break
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                once(name)
    return comparison
