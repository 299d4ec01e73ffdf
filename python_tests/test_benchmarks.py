"""What the benchmarks compare with is right, or is said to be wrong and not timed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")


@pytest.fixture
def providers(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import providers

    yield providers
    for name in ("providers", "naive"):
        sys.modules.pop(name, None)


def test_every_provider_that_is_installed_is_right(providers: ModuleType) -> None:
    for provider in providers.PROVIDERS:
        loss, why = providers.checked(provider)
        assert loss is not None or "is not installed" in why, why
    assert providers.checked(providers.PROVIDERS[0])[1] == ""


def test_a_wrong_provider_is_not_timed(providers: ModuleType) -> None:
    naive = providers.PROVIDERS[0].load()
    loss, why = providers.checked(providers.Provider("one percent", lambda: lambda *given: 1.01 * naive(*given)))
    assert loss is None and "one percent is wrong: loss off by 0.01" in why and "dW off by 0.01" in why


def test_a_provider_that_fails_is_a_row(providers: ModuleType) -> None:
    def fails(*_: Any) -> None:
        raise MemoryError("too large")

    assert providers.checked(providers.Provider("other", lambda: fails)) == (None, "other: MemoryError: too large")
    missing = providers.Provider("Liger 0.8.5", lambda: pytest.fail("loaded"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(providers.importlib.util, "find_spec", lambda name: None)
        assert providers.checked(missing) == (None, "Liger 0.8.5: liger_kernel is not installed")
