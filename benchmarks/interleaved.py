"""Timing rivals in turns, so that a machine's drift hits all alike; ratios and medians, never a time alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture


@dataclass
class Comparison:
    """Times in seconds of several ways to do the same work.

    Args:
        title: The work, its shapes and dtype.
        floor: Which of the names is the floor that the others are held against.
        targets: Highest share of the floor that a name is meant to reach.
        notes: What else was measured.
        peaks: Most bytes that a name allocated beyond its inputs.
    """

    title: str
    floor: str
    targets: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    times: dict[str, list[float]] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)

    def median(self, name: str) -> float:
        return statistics.median(self.times[name])

    def over_floor(self, name: str) -> float:
        return self.median(name) / self.median(self.floor)

    def spread(self, name: str) -> tuple[float, float]:
        """The 20th and the 80th percentile."""
        ordered = sorted(self.times[name])
        return ordered[len(ordered) // 5], ordered[-1 - len(ordered) // 5]

    def lines(self) -> list[str]:
        """A row per name: median, quantiles, share of the floor and of the target."""
        rows = []
        for name in self.times:
            low, high = self.spread(name)
            target = f"  (target {self.targets[name]:.2f}x)" if name in self.targets else ""
            peak = f"  {self.peaks[name] / 1e9:6.2f} GB" if name in self.peaks else ""
            rows.append(
                f"{name:38s} {self.median(name) * 1e3:9.2f} ms  p20 {low * 1e3:9.2f}  p80 {high * 1e3:9.2f}{peak}"
                f"  {self.over_floor(name):6.2f}x the floor{target}"
            )
        return rows + self.notes


def compare(
    benchmark: BenchmarkFixture,
    comparison: Comparison,
    contenders: dict[str, Callable[[], object]],
    prepare: dict[str, Callable[[], object]],
    rounds: int,
) -> None:
    """Times every contender once a round, in turns, after one warm round; the last is the one pytest-benchmark times.

    Args:
        benchmark: pytest-benchmark's fixture.
        comparison: Gets the times.
        contenders: What to time.
        prepare: By name, what to do before each timing of it, untimed.
        rounds: How often.
    """
    *others, ours = contenders
    comparison.times = {name: [] for name in contenders}

    def timed(name: str) -> float:
        prepare.get(name, lambda: None)()
        start = time.perf_counter()
        contenders[name]()
        return time.perf_counter() - start

    for name in contenders:
        timed(name)

    def before_round() -> None:
        for name in others:
            comparison.times[name].append(timed(name))
        prepare.get(ours, lambda: None)()

    benchmark.pedantic(contenders[ours], setup=before_round, rounds=rounds)
    comparison.times[ours] = list(benchmark.stats.stats.data)
    benchmark.extra_info.update({f"{name} over floor": round(comparison.over_floor(name), 3) for name in contenders})
