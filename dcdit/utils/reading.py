"""Reading files that somebody else made."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def open_regular(path: str | Path) -> Iterator[BinaryIO]:
    """A file, open for reading bytes as long as the block lasts. Links are followed.

    Raises:
        OSError: nothing there, not readable, or no regular file. Reading a named pipe or a device might never end.
    """
    # Without O_NONBLOCK, opening a named pipe waits until another process writes to it.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(f"it is no regular file: {str(path)!r}")
        yield file
