"""Processes that are killed just before a chosen file operation."""

import itertools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

FILE_OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
"""Audit events of everything that changes a file or folder, and of some operations that only read."""


def dies_before(number: int, work: Callable[[], Any]) -> bool:
    """Do ``work`` in a forked process, which gets SIGKILL just before its file operation ``number`` (from 0).

    Returns:
        Whether the process was killed; False if the work took fewer operations.
    """
    process = os.fork()
    if process:
        _, status = os.waitpid(process, 0)
        assert os.WIFSIGNALED(status) or status == 0, "the work failed by itself"
        return os.WIFSIGNALED(status)
    try:
        count = itertools.count()
        sys.addaudithook(lambda event, _: _maybe_die(event, count, number))
        work()
        os._exit(0)
    finally:
        os._exit(1)


def _maybe_die(event: str, count: Any, number: int) -> None:
    if event in FILE_OPERATIONS and next(count) == number:
        os.kill(os.getpid(), signal.SIGKILL)
