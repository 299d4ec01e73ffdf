"""Options of the benchmarks, the verdicts on all providers, and where the results go."""

from __future__ import annotations

import datetime
import faulthandler
import platform
import re
import resource
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from interleaved import Comparison
from memory import available
from qualify import Sizes, Verdicts, qualify
from records import Results
from tables import OURS, terminal_lines

from grpo_kernels import backends
from grpo_kernels.version import __version__

_STORE = pytest.StashKey["Store"]()
_SECONDS = 900  # that one work may take, the verdicts included
CASES = [("logits", "float32"), ("logits", "bfloat16"), ("hidden", "float32"), ("logprobs", "float32"),
         ("upstream", "float32")]  # fmt: skip


class Store:
    """The results so far, written after each work; of a part that is run again on the same day, in its rows' place."""

    def __init__(self, path: Path, is_part: bool) -> None:
        self.path = path
        self.results = Results(path.parent.name, datetime.date.today().isoformat(), versions())
        self.titles: list[str] = []  # of this session
        if is_part and path.exists():
            found = Results.load(path)
            self.results.rows, self.results.notes, self.results.extra = found.rows, found.notes, found.extra

    def add(self, comparison: Comparison) -> None:
        self.titles.append(comparison.title)
        self.results.put(comparison.title, comparison.rows(), comparison.notes)
        self.results.save(self.path)

    def of_this_session(self) -> Results:
        rows = [row for row in self.results.rows if row.title in self.titles]
        return replace(self.results, rows=rows)


def versions() -> dict[str, str]:
    """Of what a figure depends on."""
    compiler = subprocess.run(["c++", "--version"], capture_output=True, text=True).stdout.splitlines()
    found = {"grpo_kernels": __version__, "torch": torch.__version__, "python": platform.python_version()}
    found |= {"processor": processor(), "threads": str(torch.get_num_threads())}
    return found | {"simd": backends.cpu_simd_level() or "none", "compiler": compiler[0] if compiler else "none"}


def processor() -> str:
    """As Linux names it, or the architecture."""
    path = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", path.read_text()) if path.exists() else []
    return names[0] if names else platform.machine()


def device_name() -> str:
    """A folder's name for this machine."""
    simd = backends.cpu_simd_level() or platform.machine()
    return re.sub(r"[^a-z0-9]+", "-", f"{processor()} {simd} {torch.get_num_threads()} threads".lower()).strip("-")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="small shapes, few rounds: shows that it runs, not how fast")
    parser.addoption("--results", type=Path, help="folder of the result; by default that of this machine, where it is "
                     "kept under date and version")  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    default = Path(__file__).parent / "results" / device_name()
    if config.getoption("--quick"):
        default = Path(__file__).parents[1] / "build" / "bench-quick"
    folder = config.getoption("--results") or default
    resource.setrlimit(resource.RLIMIT_DATA, (available(),) * 2)  # beyond it an allocation raises
    is_part = bool(config.getoption("keyword")) or any("::" in argument for argument in config.args)
    path = folder / f"{datetime.date.today().isoformat()}-{__version__}.json"
    config.stash[_STORE] = Store(path, is_part)


@pytest.fixture(autouse=True)
def time_limit() -> Iterator[None]:
    """Ends a run that hangs; what finished is kept."""
    faulthandler.dump_traceback_later(_SECONDS, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--quick"))


@pytest.fixture(scope="session")
def sizes(quick: bool) -> Sizes:
    """Of the problems that providers are checked on; memory and head are those of the works."""
    return Sizes.quick() if quick else Sizes()


@pytest.fixture(scope="session")
def verdicts(request: pytest.FixtureRequest, sizes: Sizes) -> Verdicts:
    """On every provider, before any is timed."""
    request.config.stash[_STORE].results.extra["checked"] = sizes.told()
    return qualify(CASES, sizes)


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[Comparison], None]:
    """Where a benchmark leaves its comparison; it fails where our own could not be timed."""

    def add(comparison: Comparison) -> None:
        request.config.stash[_STORE].add(comparison)
        for name, (status, reason) in comparison.refused.items():
            assert not name.startswith(OURS) or status == "cannot run", f"{name}: {reason}"

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    store = config.stash[_STORE]
    if not store.titles:
        return
    terminalreporter.section("medians of one interleaved run")
    for line in terminal_lines(store.of_this_session()):
        terminalreporter.write_line(line)
    terminalreporter.write_line(f"\nwritten: {store.path}")
