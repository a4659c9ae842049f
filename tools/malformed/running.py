"""Running a command line on a malformed input, and judging what it said."""

import contextlib
import io
import re
import resource
import signal
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from dcdit.cli.main import main
from tools.malformed.base import Base
from tools.malformed.case import Case

SECONDS = 20
"""A command may take so long."""
MEMORY = 3 << 30
"""It may take so many bytes of address space more than the process already has."""
MARK = "code-of-a-stranger-ran"
"""The folder that code in a malformed file makes when it is run."""


class TooLate(BaseException):
    """No command catches it."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int | None
    """Its exit status; None if an exception left it."""
    lines: list[str]
    """Of stderr, without progress bars."""
    seconds: float
    ran: bool
    """Whether code of the input was run."""


def run(case: Case, base: Base, folder: Path) -> Outcome:
    """Make the input in an empty folder, run the command in this process, and tell how it ended."""
    return run_command(case.make(base, folder), folder)


def run_command(argv: list[str], folder: Path) -> Outcome:
    """Run a command line in this process with little time and address space, and tell how it ended.

    An exception that leaves it is not raised: its traceback is in the lines.
    """
    errors, began = io.StringIO(), time.monotonic()
    code: int | None = None
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()), _limited():
        try:
            code = main(argv)
        except BaseException:  # whatever leaves the command is what we look for
            errors.write("\n" + traceback.format_exc())
    seconds = time.monotonic() - began
    lines = [line.rpartition("\r")[2] for line in errors.getvalue().split("\n")]
    shown = [line for line in lines if line.strip() and not _is_bar(line)]
    return Outcome(code, shown, seconds, (folder / MARK).exists())


def problem(case: Case, outcome: Outcome) -> str | None:
    """What is wrong with an outcome; None if nothing."""
    return problem_of(outcome, case.names, case.says, (0,) if case.skipped else (2,))


def problem_of(outcome: Outcome, names: str, says: str = "", codes: tuple[int, ...] = (0, 2)) -> str | None:
    """What is wrong with the outcome of a command that reads a malformed file; None if nothing.

    Args:
        names: what the message must name.
        says: regular expression that the same line must match.
        codes: exit statuses that are accepted. After 2 there must be one line of error, after 0 warnings alone.
    """
    said = "\n".join(outcome.lines)
    if outcome.ran:
        return "code of the input was run"
    if outcome.code is None:
        return f"an exception left the command:\n{said}"
    if outcome.code not in codes:
        return f"exit status {outcome.code}: {said or 'nothing was said'}"
    errors = [line for line in outcome.lines if not line.startswith("dcdit: warning: ")]
    if len(errors) != (1 if outcome.code else 0):
        return f"{len(errors)} lines of errors: {said}"
    told = errors or outcome.lines
    if not all(line.isprintable() for line in told):
        return f"control characters: {said!r}"
    if any("weights_only=False" in line or "allow_pickle=True" in line for line in told):
        return f"advice to switch safety off: {said}"
    silent = outcome.code == 0 and codes == (0, 2)  # the damage is where nobody looks
    if not silent and not any(names in line and re.search(says, line) for line in told):
        return f"no line names {names!r} and says {says!r}: {said}"
    return None


def _is_bar(line: str) -> bool:
    return re.match(r"(\w[\w ,]*:)?\s*\d+%\|", line) is not None


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Limit time and address space of this process inside the block."""

    def late(number: int, frame: FrameType | None) -> NoReturn:
        raise TooLate

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    earlier = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, earlier)
