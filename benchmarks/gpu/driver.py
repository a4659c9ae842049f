"""Runs the groups of a report in processes of their own, within a time limit, and goes on after an earlier call.

A process ends with the first error that leaves its GPU unusable for it, and is killed when a case hangs. The next one
goes on with the case after that. What failed or was cut in an earlier call is tried again after all others.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.gpu.lines import BEGAN, DONE, FAILED, LEFT_OUT, Lines
from benchmarks.gpu.plan import ALL, GROUPS, Group, case_name

ROOT = Path(__file__).resolve().parents[2]
WORKER = ("-m", "benchmarks.gpu.worker")
LOG_FILE = "log.txt"
MOST_LOG_BYTES = 8 << 20
LOOK_EVERY = 0.2
LEAST_SECONDS = 8.0
"""A process is not started for less than this."""
MOST_FRUITLESS = 3
"""Processes in a row that finish no case; then a group is left for the next call."""
TIME_IS_OVER = "the time is over"


class Driver:
    """One call of a report.

    Args:
        lines: of the report; its folder takes the log, too.
        seconds: of this call.
        options: for the workers.
        only: names of the groups to run; empty runs all.
        say: told what happens.
    """

    def __init__(
        self,
        lines: Lines,
        seconds: float,
        options: Sequence[str] = (),
        only: Sequence[str] = (),
        say: Callable[[str], None] = print,
    ) -> None:
        self.lines, self.options, self.say = lines, options, say
        self.seconds, self.until = seconds, time.time() + seconds
        self.groups = [group for group in GROUPS if not only or group.name in only]
        # Lines are compared and not their times: the clocks of two machines may differ.
        self.earlier = {name: line for name, line in lines.last().items() if line["state"] != DONE}

    def run(self) -> None:
        """The groups, each within its share; the rest of those it was too short for; what an earlier call left open."""
        for group in self.groups:
            self._run_group(group, self._fresh, min(self.until, time.time() + group.share * self.seconds))
        for group in self.groups:
            self._run_group(group, self._fresh, self.until)
        for group in self.groups:
            self._run_group(group, self._left_open, self.until)

    def _fresh(self, group: Group) -> list[str]:
        """Cases that no call has tried. Tests are one case here until all of them ran."""
        last = self.lines.last()
        if group.name == "tests":
            return [] if last.get(case_name(group.name, ALL), {}).get("state") == DONE else [ALL]
        return [case for case in group.cases if case_name(group.name, case) not in last]

    def _left_open(self, group: Group) -> list[str]:
        """Cases that an earlier call tried in vain or left out, and this one did not try."""
        last = self.lines.last()
        still_open = {name for name, line in self.earlier.items() if last[name] == line and line["state"] != LEFT_OUT}
        if group.name == "tests":
            return [ALL] if any("::" in name for name in still_open) else []
        still_open |= {name for name, line in self.earlier.items() if last[name] == line}
        return [case for case in group.cases if case_name(group.name, case) in still_open]

    def _run_group(self, group: Group, pending: Callable[[Group], list[str]], until: float) -> None:
        fruitless = 0
        while until - time.time() >= LEAST_SECONDS and fruitless < MOST_FRUITLESS:
            cases = pending(group)
            if not cases:
                return
            finished = self._finished()
            self._run_process(group, cases, until)
            fruitless = 0 if self._finished() > finished else fruitless + 1
            if group.name == "tests":
                return

    def _finished(self) -> int:
        return sum(line["state"] in (DONE, LEFT_OUT) for line in self.lines.last().values())

    def _run_process(self, group: Group, cases: Sequence[str], until: float) -> None:
        self.say(f"gpu-report: {group.name}: {len(cases)} to do, at most {until - time.time():.0f} s")
        before = len(self.lines.read())
        command = [sys.executable, *WORKER, "--folder", str(self.lines.path.parent), *self.options]
        command += ["--parent", str(os.getpid()), "--group", group.name, "--until", f"{until:.1f}", "--cases", *cases]
        with open(self.lines.path.with_name(LOG_FILE), "ab") as log:
            if log.tell() > MOST_LOG_BYTES:
                log.truncate(0)
            process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
            try:
                why = self._watch(process, group.patience, until)
            finally:
                _kill(process)
        if not why or why == TIME_IS_OVER:  # a case that was cut by the end of the time is not at fault
            return
        self.say(f"gpu-report: {group.name}: {why}")
        written = self.lines.read()[before:]
        if not written or written[-1]["state"] == BEGAN:  # else the process told of its error before it ended
            name = written[-1]["case"] if written else case_name(group.name, "start")
            self.lines.write(name, FAILED, error=f"{why}\n{self._end_of_log()}")

    def _watch(self, process: "subprocess.Popen[bytes]", patience: float, until: float) -> str:
        """Wait for a process; returns why it has to be killed or how it died, and nothing if it ended well."""
        size, changed = -1, time.time()
        while process.poll() is None:
            time.sleep(LOOK_EVERY)
            now, found = time.time(), self.lines.path.stat().st_size if self.lines.path.is_file() else 0
            if found != size:
                size, changed = found, now
            if now > until:
                return TIME_IS_OVER
            if now - changed > patience:
                return f"killed after {patience:.0f} s without a result"
        code = process.returncode
        if code == 0:
            return ""
        return f"its process ended with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"

    def _end_of_log(self, characters: int = 1500) -> str:
        text = self.lines.path.with_name(LOG_FILE).read_text(errors="replace")
        return text[-characters:].strip()


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """The process and all that it started: they are a session of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
