"""``make mutate``: the texts and the tests of its faults are still there, and a fault that passes is told."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import mutate
import pytest

WIDTH = ("test_module.py::test_width",)
NOTICED = mutate.Fault("noticed", "module.py", old="WIDTH = 2", new="WIDTH = 3", tests=WIDTH)
BROKEN = mutate.Fault("broken", "module.py", old="WIDTH = 2", new="WIDTH = (", tests=WIDTH)
MISSED = mutate.Fault("missed", "module.py", old="HEIGHT = 4", new="HEIGHT = 5", tests=WIDTH)


@cache
def functions(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("fault", mutate.FAULTS, ids=lambda fault: fault.name)
def test_a_fault_finds_its_text_and_its_tests(fault: mutate.Fault) -> None:
    before = (mutate.ROOT / fault.path).read_text()
    assert fault.plant(before) != before
    assert 1 <= len(fault.tests) == len(set(fault.tests)) <= 5
    for test in fault.tests:
        file, name = test.split("::")
        assert name.split("[")[0] in functions(mutate.ROOT / mutate.TESTS / file), test


def test_a_text_that_is_not_there_once_is_named() -> None:
    for text, count in (("WIDTH = 1", 0), ("WIDTH = 2, WIDTH = 2", 2)):
        with pytest.raises(ValueError, match=rf"noticed: expected its text once in module\.py, found it {count} times"):
            NOTICED.plant(text)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / mutate.TESTS).mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "module.py").write_text("WIDTH = 2\nHEIGHT = 4\n")
    (tmp_path / mutate.TESTS / "test_module.py").write_text(
        "import module\n\n\ndef test_width():\n    assert module.WIDTH == 2\n"
    )
    return tmp_path


def test_a_fault_that_no_test_notices_fails_the_run(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (tree / "module.py").read_text()
    assert mutate.check_all([NOTICED, MISSED], tree) == 1
    assert (tree / "module.py").read_text() == before
    printed = capsys.readouterr().out
    assert "missed: missed: test_module.py::test_width: passed\n1 of 2 faults are noticed" in printed
    assert [line.split("|")[4].strip() for line in printed.splitlines()[2:4]] == ["1 of 1", "0 of 1"]


def test_a_fault_that_cannot_be_imported_is_not_noticed(tree: Path) -> None:
    assert mutate.check(BROKEN, tree).missed == "test_module.py::test_width: not run"


def test_a_test_that_does_not_end_notices_nothing(tree: Path) -> None:
    assert mutate.check(NOTICED, tree, seconds=0).missed == "not done in 0 s"
    assert "WIDTH = 2" in (tree / "module.py").read_text()
