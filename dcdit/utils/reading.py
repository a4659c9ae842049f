"""Reading files that somebody else made."""

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

BLOCK = 1 << 20
"""Bytes that are read at a time."""


@contextmanager
def open_regular(path: str | Path) -> Iterator[BinaryIO]:
    """A file, open for reading bytes as long as the block lasts. Links are followed.

    Raises:
        OSError: nothing there, not readable, or no regular file. Reading a named pipe or a device might never end.
    """
    # Without O_NONBLOCK, opening a named pipe waits until another process writes to it.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "no regular file", str(path))
        yield file


def sha256(path: Path, progress: Callable[[int], Any] = lambda count: None) -> str:
    """Of a file, in hexadecimal digits.

    Args:
        progress: called with the number of bytes after each block.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(BLOCK):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()
