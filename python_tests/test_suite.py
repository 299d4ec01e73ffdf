"""The test run itself: shared fixtures run once."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from conftest import SHARED_FIXTURES


def module_fixtures() -> set[str]:
    """The names of all fixtures of modules."""
    names = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        for node in ast.parse(path.read_text()).body:
            decorators = map(ast.unparse, getattr(node, "decorator_list", []))
            if any(text.startswith("pytest.fixture(") and "scope='module'" in text for text in decorators):
                names.add(node.name)
    return names


def test_shared_fixtures_are_fixtures_of_a_module() -> None:
    assert module_fixtures() >= SHARED_FIXTURES


@pytest.mark.xdist_group("suite")
def test_pytest_xdist_knows_the_groups(request: pytest.FixtureRequest) -> None:
    """With pytest 9.2, pytest-xdist 3.8 ignores them and says nothing."""
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("not in a worker of a run with --dist loadgroup")
    assert request.node.nodeid.endswith("@suite")
