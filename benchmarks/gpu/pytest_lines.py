"""A pytest plugin: a line in the report for every test the moment it ends, on whatever process it ran."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.lines import DONE, FAILED, LEFT_OUT, Lines

FOLDER, DEVICE, SKIPPED_TESTS = "DCDIT_REPORT_FOLDER", "DCDIT_REPORT_DEVICE", "DCDIT_REPORT_TESTS"
"""Environment variables: the folder of the report, its device, a file with tests that passed or are to run last."""
LONGEST_MESSAGE = 2000
ROOT = Path(__file__).resolve().parents[2]
"""Left out of messages: where a checkout lies says nothing to others."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what passed before, and put what failed before at the end."""
    marks = [line.split(" ", 1) for line in Path(os.environ[SKIPPED_TESTS]).read_text().splitlines()]
    passed = {name for mark, name in marks if mark == "passed"}
    last = {name for mark, name in marks if mark == "last"}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
    items[:] = [item for item in items if item.nodeid not in passed]
    items.sort(key=lambda item: item.nodeid in last)  # stable


def pytest_runtest_setup(item: pytest.Item) -> None:
    """End a process whose GPU context an earlier test destroyed; xdist starts another one for the tests that follow."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


class Recorder:
    """Writes the lines: on the process that collects the reports of all others."""

    def __init__(self) -> None:
        self.lines = Lines(Path(os.environ[FOLDER]), device=os.environ[DEVICE])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = f"tests: {report.nodeid}"
        if report.failed:
            self.lines.write(name, FAILED, error=_message(report), seconds=round(report.duration, 2))
        elif report.skipped:
            self.lines.write(name, LEFT_OUT, reason=_reason(report))
        elif report.when == "call":
            self.lines.write(name, DONE, seconds=round(report.duration, 2))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.lines.write(
                f"tests: {report.nodeid}::collection", FAILED, error=str(report.longrepr)[-LONGEST_MESSAGE:]
            )


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(), "dcdit-report")


def _message(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    where = f"{crash.path}:{crash.lineno}: {crash.message}" if crash else ""
    text = (where or str(report.longrepr)).replace(f"{ROOT}/", "")
    return text if len(text) <= LONGEST_MESSAGE else text[:LONGEST_MESSAGE] + " ..."


def _reason(report: Any) -> str:
    return str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)
