"""Options of the benchmarks, and their one table: every time over the floor measured in the same run."""

from __future__ import annotations

import platform

import pytest
import torch
from interleaved import Comparison

_COMPARISONS = pytest.StashKey[list[Comparison]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="fewer tokens and rounds: shows that it runs, not how fast")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_COMPARISONS] = []


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--quick"))


@pytest.fixture
def report(request: pytest.FixtureRequest) -> list[Comparison]:
    """Where a benchmark leaves its comparison for the table."""
    return request.config.stash[_COMPARISONS]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    comparisons = config.stash[_COMPARISONS]
    if not comparisons:
        return
    write = terminalreporter.write_line
    terminalreporter.section("medians of one interleaved run")
    write(f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads")
    for comparison in comparisons:
        write("")
        write(f"{comparison.title}")
        for line in comparison.lines():
            write(f"  {line}")
