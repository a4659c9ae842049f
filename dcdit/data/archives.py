"""NumPy arrays in files, whose sizes are compared with the file before memory is taken for them."""

import math
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from dcdit.utils.reading import BEGINNING, kind_of, open_regular
from dcdit.utils.text import one_line

Array = np.ndarray[Any, Any]
MAX_RATIO, FREE_BYTES = 100, 1 << 30
"""An array that unpacks to more than so many times its packed size is refused, if it has more than so many bytes."""


class UnreadableArchive(ValueError):
    """An ``.npz`` that is damaged. ``reason`` is the message without the path."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is not readable as .npz: {reason}")
        self.reason = reason


@dataclass(frozen=True)
class Header:
    """What a file says about the array in it."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool


class Npz:
    """The arrays in an open ``.npz``; see :func:`open_npz`."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path, self._archive = path, archive
        self.names = [name.removesuffix(".npy") for name in archive.namelist()]

    def __contains__(self, name: str) -> bool:
        return name in self.names

    @contextmanager
    def stream(self, name: str) -> Iterator[tuple[Header, IO[bytes]]]:
        """The header of an array, and the file that its data come from.

        Raises:
            UnreadableArchive: no array of that name, or one whose header does not fit the size of its data.
        """
        if f"{name}.npy" not in self._archive.namelist():
            raise UnreadableArchive(self.path, f"no {name}.npy in it")
        info = self._archive.getinfo(f"{name}.npy")
        with self._archive.open(info) as file:
            yield self._header(name, file, info.file_size), file

    def read(self, name: str) -> Array:
        """An array.

        Raises:
            UnreadableArchive: it is damaged, holds Python objects, or is packed too well to be data.
        """
        with self.stream(name):
            info = self._archive.getinfo(f"{name}.npy")
        if info.file_size > max(FREE_BYTES, MAX_RATIO * info.compress_size):
            reason = f"{name} unpacks from {info.compress_size} bytes to {info.file_size}; accepted: {MAX_RATIO} times"
            raise UnreadableArchive(self.path, reason)
        with self._archive.open(info) as file:
            try:
                return np.lib.format.read_array(file, allow_pickle=False)
            except ValueError as error:
                raise UnreadableArchive(self.path, f"{name}: {one_line(error)}") from None

    def _header(self, name: str, file: IO[bytes], size: int) -> Header:
        try:
            return _read_header(file, size)
        except ValueError as error:
            raise UnreadableArchive(self.path, f"{name}: {error}") from None


@contextmanager
def open_npz(path: Path) -> Iterator[Npz]:
    """An ``.npz`` as long as the block lasts.

    Raises:
        FileNotFoundError: nothing there.
        UnreadableArchive: no archive, or whatever goes wrong in reading it within the block.
    """
    if not os.path.lexists(path):
        raise FileNotFoundError(f"no file {str(path)!r}")
    try:
        with open_regular(path) as file, _open_zip(path, file) as archive:
            yield Npz(path, archive)
    except ValueError:  # of this module, or of the block
        raise
    except OSError as error:
        raise UnreadableArchive(path, error.strerror or one_line(error)) from None
    except Exception as error:  # a damaged zip raises BadZipFile, zlib.error, EOFError, NotImplementedError and others
        raise UnreadableArchive(path, one_line(error)) from None


def _open_zip(path: Path, file: IO[bytes]) -> zipfile.ZipFile:
    beginning = file.read(BEGINNING)
    file.seek(0)
    try:
        return zipfile.ZipFile(file)
    except (ValueError, zipfile.BadZipFile) as error:
        known = None if beginning.startswith(b"PK") else kind_of(beginning)
        raise UnreadableArchive(path, known or one_line(error)) from None


# --- one array -----------------------------------------------------------------------------------------------------


def map_npy(path: Path) -> Array:
    """The array in a ``.npy``, which stays on disk.

    Raises:
        OSError: it cannot be opened, or is no regular file.
        ValueError: it is damaged, holds Python objects, or its header does not fit its size.
    """
    with open_regular(path) as file:
        header = _read_header(file, os.fstat(file.fileno()).st_size)
        order: Literal["F", "C"] = "F" if header.fortran else "C"
        if not math.prod(header.shape):
            return np.empty(header.shape, header.dtype)
        return np.memmap(file, header.dtype, "r", file.tell(), header.shape, order)


def parse_npy(file: IO[bytes], size: int) -> Array:
    """The array in an open ``.npy`` of ``size`` bytes. ValueError as in :func:`map_npy`."""
    _read_header(file, size)
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def _read_header(file: IO[bytes], size: int) -> Header:
    """The header of a ``.npy`` of ``size`` bytes; the file is then at its data.

    Raises:
        ValueError: no such header, Python objects, or another size of the data than the header says.
    """
    try:
        version = np.lib.format.read_magic(file)
        one = version == (1, 0)
        read = np.lib.format.read_array_header_1_0 if one else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except zipfile.BadZipFile:
        raise
    except Exception as error:  # NumPy parses the header as Python, and a damaged one raises anything
        # NumPy's advice for a header that is too long is to allow pickles, and is left out.
        raise ValueError(f"its header cannot be read: {one_line(error).partition('. To allow')[0]}") from None
    if dtype.hasobject:
        raise ValueError("it holds Python objects; accepted: numbers or text")
    said, there = math.prod(shape) * dtype.itemsize, size - file.tell()
    if said != there or not all(0 <= side < 1 << 48 for side in shape):
        raise ValueError(f"it is said to be {dtype} {shape}, {said} bytes, and has {there}")
    return Header(shape, dtype, fortran)
