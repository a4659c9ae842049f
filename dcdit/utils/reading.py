"""Reading files that somebody else made: only regular ones, and only as much as is expected."""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from dcdit.utils.text import one_line

BLOCK = 1 << 20
"""Bytes that are read at a time."""
BEGINNING = 4096
"""Bytes by which a file is known."""
JSON_BYTES = 1 << 26
"""A JSON file may have so many bytes; an index of a million images has that many."""
KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
WEB_PAGE = "a web page: its address was that of a page about the file, or wanted a login"
BEGINNINGS = {
    b"version https://git-lfs": "a Git LFS pointer and not the file itself, which git lfs pull gets",
    b"<!doctype html": WEB_PAGE,
    b"<html": WEB_PAGE,
    b"<?xml": "an XML document, as servers send instead of a file that they refuse",
    b"pk\x03\x04": "a zip archive",
    b"\x1f\x8b": "compressed with gzip",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"\xfd7zxz": "compressed with xz",
    b"\x89hdf": "an HDF5 file",
    b"\x89png": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x93numpy": "a NumPy array (.npy)",
    b"%pdf": "a PDF document",
}
"""How files that are taken for another kind begin, in small letters, and what they are."""


@contextmanager
def open_regular(path: str | Path) -> Iterator[BinaryIO]:
    """A file, open for reading bytes as long as the block lasts. Links are followed.

    Raises:
        OSError: nothing there, not readable, or no regular file. Reading a named pipe or a device might never end.
    """
    # Without O_NONBLOCK, opening a named pipe waits until another process writes to it. What was opened is looked at,
    # not what the path leads to: that may change in between.
    try:
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    except OSError as error:
        kind = {errno.EISDIR: stat.S_IFDIR, errno.ENXIO: stat.S_IFSOCK}.get(error.errno or 0)
        if kind is None:
            raise
        raise _not_regular(path, kind) from None
    with file:
        kind = stat.S_IFMT(os.fstat(file.fileno()).st_mode)
        if kind != stat.S_IFREG:
            raise _not_regular(path, kind)
        yield file


def read_bytes(path: str | Path, at_most: int) -> bytes:
    """The content of a file.

    Raises:
        OSError: as in :func:`open_regular`.
        ValueError: it has more than ``at_most`` bytes.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        # No more is asked for than there is: Python takes memory for all that is asked for.
        data = file.read(min(size, at_most) + 1)
    if len(data) > min(size, at_most):
        raise ValueError(f"{path} is too large, or is being written; accepted: at most {at_most} bytes")
    return data


def read_json(path: str | Path) -> Any:
    """The value in a JSON file.

    Raises:
        OSError: as in :func:`open_regular`.
        ValueError: it is not JSON (cut short, nested too deep, a key twice, ...), or has over ``JSON_BYTES`` bytes.
    """
    return parse_json(read_bytes(path, JSON_BYTES), str(path))


def parse_json(data: bytes | str, source: str) -> Any:
    """The value in a JSON text. ValueError, which names the source, as in :func:`read_json`."""
    try:
        return json.loads(data, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError(f"{source} is damaged or no JSON: it is nested too deep") from None
    except ValueError as error:
        what = kind_of(data) if isinstance(data, bytes) else None
        raise ValueError(f"{source} is damaged or no JSON: {what or one_line(error)}") from None


def kind_of(data: bytes) -> str | None:
    """What a file is that begins with these bytes, where it is none of those that this package reads: ``it is ...``."""
    if not data:
        return "it is empty"
    if not data.strip(b"\0"):
        return "it holds nothing but zeros, as a file that was cut off by a crash"
    start = data[:64].lstrip().lower()
    return next((f"it is {what}" for beginning, what in BEGINNINGS.items() if start.startswith(beginning)), None)


def kind_of_file(path: str | Path) -> str | None:
    """:func:`kind_of` for a file. None also if it cannot be read."""
    try:
        with open_regular(path) as file:
            return kind_of(file.read(BEGINNING))
    except OSError:
        return None


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


def _not_regular(path: str | Path, kind: int) -> OSError:
    number = errno.EISDIR if kind == stat.S_IFDIR else errno.EINVAL
    return OSError(number, f"no regular file but {KINDS.get(kind, 'something else')}", str(path))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found
