"""NumPy arrays in files, whose sizes are compared with the file before memory is taken for them."""

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from dcdit.utils.reading import open_regular

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
            header = self._header(name, file)
            there = info.file_size - file.tell()
            said = math.prod(header.shape) * header.dtype.itemsize
            if not header.dtype.hasobject and (said != there or min(header.shape, default=0) < 0):
                reason = f"{name} is said to be {header.dtype} {header.shape}, {said} bytes, and has {there}"
                raise UnreadableArchive(self.path, reason)
            yield header, file

    def read(self, name: str) -> Array:
        """An array.

        Raises:
            UnreadableArchive: it is damaged, holds Python objects, or is packed too well to be data.
        """
        with self.stream(name) as (header, _):
            if header.dtype.hasobject:
                raise UnreadableArchive(self.path, f"{name} holds Python objects; accepted: numbers or text")
        info = self._archive.getinfo(f"{name}.npy")
        if info.file_size > max(FREE_BYTES, MAX_RATIO * info.compress_size):
            reason = f"{name} unpacks from {info.compress_size} bytes to {info.file_size}; accepted: {MAX_RATIO} times"
            raise UnreadableArchive(self.path, reason)
        with self._archive.open(info) as file:
            try:
                return np.lib.format.read_array(file, allow_pickle=False)
            except ValueError as error:
                raise UnreadableArchive(self.path, f"{name}: {_one_line(error)}") from None

    def _header(self, name: str, file: IO[bytes]) -> Header:
        try:
            version = np.lib.format.read_magic(file)
            one = version == (1, 0)
            read = np.lib.format.read_array_header_1_0 if one else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
        except zipfile.BadZipFile:
            raise
        except Exception as error:  # NumPy parses the header as Python, and a damaged one raises anything
            raise UnreadableArchive(self.path, f"{name}: {_one_line(error)}") from None
        return Header(shape, dtype, fortran)


@contextmanager
def open_npz(path: Path) -> Iterator[Npz]:
    """An ``.npz`` as long as the block lasts.

    Raises:
        FileNotFoundError: nothing there.
        UnreadableArchive: no archive, or whatever goes wrong in reading it within the block.
    """
    if not path.exists():
        raise FileNotFoundError(f"no file {str(path)!r}")
    try:
        with open_regular(path) as file, _open_zip(path, file) as archive:
            yield Npz(path, archive)
    except ValueError:  # of this module, or of the block
        raise
    except Exception as error:  # a damaged zip raises BadZipFile, zlib.error, EOFError, NotImplementedError and others
        raise UnreadableArchive(path, _one_line(error)) from None


def _open_zip(path: Path, file: IO[bytes]) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except ValueError as error:
        raise UnreadableArchive(path, _one_line(error)) from None


def map_npy(path: Path) -> Array:
    """The array in a ``.npy``, which stays on disk.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    with open_regular(path):
        pass
    return np.lib.format.open_memmap(path, mode="r")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
