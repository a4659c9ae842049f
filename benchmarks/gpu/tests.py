"""The correctness part of a report: the tests of kernels and model on the device, a line for each.

They run in many processes, because each compiles its kernels. What already passed on this device is not run again.
"""

import argparse
import os
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.lines import DONE, FAILED, Lines
from benchmarks.gpu.pytest_lines import DEVICE, FOLDER, SKIPPED_TESTS
from benchmarks.gpu.setting import Setting
from tools.gpu_suite import MOST_IMPORTANT_FIRST, PROCESSES, pytest_command

ROOT = Path(__file__).resolve().parents[2]
GROUP = "tests"
REHEARSED = ("tests/kernels/test_ratio_loss.py", "tests/kernels/test_launch.py")


class TestCases:
    """The one case: all tests that did not pass yet, those that failed before at the end."""

    __test__ = False

    def __init__(self, setting: Setting, lines: Lines) -> None:
        self.setting, self.lines = setting, lines

    def run(self, case: str) -> Mapping[str, Any]:
        last = {name: line["state"] for name, line in self.lines.last().items() if "::" in name}
        prefix = f"{GROUP}: "
        passed = [name.removeprefix(prefix) for name, state in last.items() if state == DONE]
        failed = [name.removeprefix(prefix) for name, state in last.items() if state == FAILED]
        files = REHEARSED if self.setting.rehearsal else MOST_IMPORTANT_FIRST
        with tempfile.TemporaryDirectory() as folder:
            skipped = Path(folder) / "tests.txt"
            skipped.write_text(
                "\n".join([*(f"passed {name}" for name in passed), *(f"last {name}" for name in failed)])
            )
            environment = {
                **os.environ,
                FOLDER: str(self.lines.path.parent),
                DEVICE: self.lines.common["device"],
                SKIPPED_TESTS: str(skipped),
            }
            if self.setting.rehearsal:
                environment["DCDIT_PTX"] = "90"  # compiled kernels, whose PTX runs on a CPU (tools/ptx)
            processes = 2 if self.setting.rehearsal else PROCESSES
            command = pytest_command(files, processes, "-p", "benchmarks.gpu.pytest_lines")
            code = subprocess.run(command, cwd=ROOT, env=environment).returncode
        if code not in (0, 1, 5):  # all passed, some failed, none to run
            raise RuntimeError(f"pytest ended with exit code {code}: see the log")
        return {"tests": dict(Counter(line["state"] for name, line in self.lines.last().items() if "::" in name))}


def create(group: str, setting: Setting, lines: Lines, arguments: argparse.Namespace) -> TestCases:
    return TestCases(setting, lines)
