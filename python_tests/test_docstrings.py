"""Docstrings of public functions: each begins with an example that runs, and sends its reader on once at most."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import re
from collections.abc import Iterator

import pytest
import torch

import grpo_kernels

FUNCTIONS = [name for name in grpo_kernels.__all__ if inspect.isfunction(getattr(grpo_kernels, name))]
CLASSES = ["AdaptiveEntropy", "GRPOLoss", "GRPOLossConfig", "LinearGRPOLoss"]
NAMES = {name: getattr(grpo_kernels, name) for name in grpo_kernels.__all__}


def _doc(name: str) -> str:
    return inspect.getdoc(NAMES[name]) or ""


@pytest.mark.parametrize("name", [*FUNCTIONS, *CLASSES])
def test_a_docstring_begins_with_a_call_that_runs(name: str) -> None:
    doc = _doc(name)
    before, found, _ = doc.partition("Example:\n    >>> ")
    assert found, f"{name} has no example"
    assert len(before.strip().split("\n\n")) <= 2, f"{name}: its example comes after more than a summary and a formula"
    if name == "apply_grpo_kernels_to_trl" and importlib.util.find_spec("trl") is None:
        pytest.skip("TRL is not installed")
    test = doctest.DocTestParser().get_doctest(doc, {**NAMES, "torch": torch}, name, None, None)
    assert any(name in example.source for example in test.examples)
    messages: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=messages.append)
    assert not messages, "".join(messages)


def _entries(name: str, heading: str) -> Iterator[tuple[str, str]]:
    """Each argument, or each exception, with its text."""
    section = re.search(rf"^{heading}:\n((?:    .*\n|\n)+)", _doc(name) + "\n", re.MULTILINE)
    for entry in re.split(r"\n(?=    \S)", section[1].rstrip()) if section else ():
        names, text = re.match(r"\s*([\w\s,*]+?):\s(.*)", entry, re.DOTALL).groups()  # type: ignore[union-attr]
        for argument in re.split(r",\s+", names):
            yield argument.strip("* "), " ".join(text.split())


TEXTS = {name: dict(_entries(name, "Args")) for name in FUNCTIONS}
ERRORS = {name: dict(_entries(name, "Raises")) for name in FUNCTIONS}
REFERENCE = re.compile(r"\bas for ((?:``\w+``(?:, | and )?)+)", re.IGNORECASE)


def _references(text: str) -> list[str]:
    """The functions that a text sends its reader on to."""
    return [other for names in REFERENCE.findall(text) for other in re.findall(r"\w+", names)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_is_explained(name: str) -> None:
    parameters = inspect.signature(NAMES[name]).parameters
    if "Args:" in _doc(name):
        assert sorted(TEXTS[name]) == sorted(parameters)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_reader_is_sent_on_once(name: str) -> None:
    for argument, text in TEXTS[name].items():
        for other in _references(text):
            plain = argument.removeprefix("reference_").removeprefix("teacher_")
            there = TEXTS[other].get(argument) or TEXTS[other].get(plain)
            assert there, f"{name}: {argument} is as for {other}, which has none"
            assert not _references(there), f"{name}: {argument} is as for {other}, and there: {there}"
    for error, text in ERRORS[name].items():
        for other in _references(text):
            there = ERRORS[other][error]
            assert not _references(there), f"{name}: {error} is as for {other}, and there: {there}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_docstring_is_read_beside_two_others_at_most(name: str) -> None:
    others = sorted({other for text in (*TEXTS[name].values(), *ERRORS[name].values()) for other in _references(text)})
    assert len(others) <= 2, f"{name} sends its reader on to {', '.join(others)}"


def test_the_default_configuration_is_short_in_a_signature() -> None:
    for name in ("grpo_loss", "linear_grpo_loss", "policy_loss"):
        default = inspect.signature(NAMES[name]).parameters["config"].default
        assert default == grpo_kernels.GRPOLossConfig() and repr(default) == "GRPOLossConfig()"
