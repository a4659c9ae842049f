"""The results of a report: one JSON line per case, forced to disk the moment it is known.

A line says which case it is about, on which device, and its state. The last line of a case counts:

    began      it runs, or was cut: its process was killed with it
    done       measured, or a test that passed
    failed     an error, which the line holds
    left out   it cannot run here, and the line says why
"""

import errno
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LINES_FILE = "lines.jsonl"
BEGAN, DONE, FAILED, LEFT_OUT = "began", "done", "failed", "left out"

Line = dict[str, Any]


class LeftOut(Exception):
    """Raised by a case that cannot run here; the message says why."""


class Lines:
    """The file of lines in the folder of a report.

    Args:
        folder: of the report.
        common: what every line written here holds, such as the device.
    """

    def __init__(self, folder: Path, **common: Any) -> None:
        self.path, self.common = folder / LINES_FILE, common

    def write(self, case: str, state: str, **values: Any) -> None:
        """Append a line. When this returns, no kill and no loss of power can take it back.

        Raises:
            OSError: the disk is full; it may hold the beginning of the line.
        """
        line = {"case": case, "state": state, "at": round(time.time(), 2), **self.common, **values}
        text = json.dumps(line, default=str) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            if _ends_torn(self.path):
                text = "\n" + text
            data = text.encode()
            if os.write(descriptor, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def read(self) -> list[Line]:
        """All whole lines in order. A line that a kill or a full disk cut short is left out."""
        return list(_whole_lines(self.path))

    def last(self) -> dict[str, Line]:
        """The last line of each case that belongs to what is common here (device, ...), in the order they began."""
        found: dict[str, Line] = {}
        for line in self.read():
            if all(line.get(key) == value for key, value in self.common.items()):
                found[line["case"]] = line
        return found


def _whole_lines(path: Path) -> Iterator[Line]:
    if not path.is_file():
        return
    for text in path.read_bytes().split(b"\n"):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("case"), str) and isinstance(line.get("state"), str):
            yield line


def _ends_torn(path: Path) -> bool:
    """Whether the file ends inside a line."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        if not size:
            return False
        file.seek(size - 1)
        return file.read(1) != b"\n"
