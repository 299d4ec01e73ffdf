"""A plugin of pytest: prints why a test failed when it fails, and ends a worker that lost the GPU.

A run that is stopped never comes to pytest's own end. An error that stays with a process's context on the GPU would
fail all its later tests: pytest-xdist has another worker go on.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
import torch

from gpu.stages import LOST_CONTEXT

#: How the line begins that has the error in short.
REASON = "REASON "
_MOST_CHARACTERS = 4000


class Failures:
    """Writes through pytest's own terminal, in the process that has it."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self._terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._tell(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._tell(report)

    def _tell(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if not report.failed:
            return
        text = report.longreprtext
        self._terminal.ensure_newline()
        self._terminal.write_line(text[-_MOST_CHARACTERS:])
        crash = getattr(report.longrepr, "reprcrash", None)  # not there for a file that cannot be imported
        message = " ".join((text if crash is None else crash.message).split())
        self._terminal.write_line(f"{REASON}{report.nodeid}: {message[-300:] if crash is None else message[:300]}")


class Worker:
    """Ends a worker of pytest-xdist after a test that lost the GPU, once its reports are sent."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Generator[None, object, object]:
        done = yield
        if torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError:  # the test's report has it
                os._exit(LOST_CONTEXT)
        return done


@pytest.hookimpl(trylast=True)  # when the terminal is there
def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist
        config.pluginmanager.register(Worker(), "lost_context")
        return
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None:
        config.pluginmanager.register(Failures(terminal), "failures_as_they_come")
