"""What the tests share."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType

import hypothesis
import pytest
import torch

from grpo_kernels import backends
from grpo_kernels.device_values import first_bad

SIMD_LEVELS = ("baseline", "avx2", "avx512")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", default="0/1", help="I/N: of the selected tests every N-th, from the I-th")
    parser.addoption("--simd-level", choices=SIMD_LEVELS, help="the C++ kernels' instructions: no wider than these")


def pytest_configure(config: pytest.Config) -> None:
    level = config.getoption("--simd-level")
    if level is not None:
        backends.cpu_simd_level()  # loads the library
        torch.ops.grpo_kernels.cpu_limit_simd_level(SIMD_LEVELS.index(level))


#: Fixtures of a module that train, build or start processes. Tests that use one share a worker, so it runs once.
SHARED_FIXTURES = {"bad", "further", "one", "program", "reduced", "run", "shared", "trained", "wheel", "whole"}


def pytest_itemcollected(item: pytest.Item) -> None:
    for name in SHARED_FIXTURES.intersection(getattr(item, "fixturenames", ())):
        item.add_marker(pytest.mark.xdist_group(f"{item.location[0]}-{name}"))


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part, parts = map(int, config.getoption("--part").split("/"))
    items[:] = items[part::parts]
    items.sort(key=lambda item: item.get_closest_marker("early") is None)


hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=40)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def forgotten_values() -> Iterator[None]:
    """What a test's calls met, an infinite loss say, is not another test's."""
    yield
    first_bad(torch.device("cpu")).fill_(torch.iinfo(torch.int64).max)


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory that nobody has written holds NaN, or the largest integer, whether Python or C++ asks for it."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many small shapes: waking a second thread takes longer than the work. Threads have tests of their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["grpo_kernels.rewards.bubblewrap", "namespace_sandbox"])
def sandbox(request: pytest.FixtureRequest) -> ModuleType:
    """The module of each sandbox for untrusted programs; skips, with the reason, where the machine has none."""
    module = importlib.import_module(request.param)  # here: what runs on a GPU machine needs no rewards
    if reason := module.unavailable():
        pytest.skip(reason)
    return module
