# SPDX-License-Identifier: Apache-2.0
"""In CI a test may be skipped for the reasons listed here only; any other skip fails the run.

A test that is skipped where everything should be installed proves nothing, and nobody sees it. Elsewhere (no CI=true in
the environment) skips stay skips.
"""

from __future__ import annotations

import os
import re

import pytest

#: Start of a skip's reason -> why CI cannot do without it.
ALLOWED = {
    "needs MQBench, see docs/mqbench.md": "MQBench is in no package registry: `make test-mqbench` is its command",
    "no real data": "images and videos are not ours to hand out; a folder that AHCQ_DATA names must be there",
}


class UnexpectedSkips:
    """Plugin that collects the skips of a run and makes it fail for those whose reason is not allowed."""

    def __init__(self) -> None:
        self.places: dict[str, list[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)  # of a whole module

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if not report.skipped or hasattr(report, "wasxfail"):
            return
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        if not any(reason.startswith(start) for start in ALLOWED):
            self.places.setdefault(reason, []).append(report.nodeid)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.places and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.places:
            return
        terminalreporter.section("skips that fail this run, because CI=true", red=True)
        for reason, places in self.places.items():
            terminalreporter.write_line(f"{reason}: {', '.join(sorted(set(places)))}")
        terminalreporter.write_line(
            "Install what is missing, or add the reason to ALLOWED in tests/skips.py and say why."
        )


def register(config: pytest.Config) -> None:
    """Watch the skips where CI=true (or 1), in the process that reports: under pytest-xdist, the one without tests."""
    if re.fullmatch("true|1", os.environ.get("CI", ""), re.IGNORECASE) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(UnexpectedSkips())
