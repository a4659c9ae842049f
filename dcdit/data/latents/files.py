"""Many small files by number, in a folder or an uncompressed zip. Any process may read any of them."""

import functools
import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

import numpy as np

from dcdit.data.archives import parse_npy
from dcdit.data.samples import DamagedFile
from dcdit.utils.reading import kind_of, kind_of_file, open_regular, read_bytes
from dcdit.utils.text import one_line

T = TypeVar("T")
Array = np.ndarray[Any, Any]
FILE_BYTES = 1 << 30
"""The file of one image may have so many."""
LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Header of a file inside a zip: signature, and the lengths of the name and the extra field that follow."""


class PerProcess(Generic[T]):
    """An object, such as an open file, that every process makes for itself on first use.

    Processes never share it: a forked process or a worker makes its own.

    Args:
        make: makes the object. Pickling stores ``make``, not the object.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self.make = make
        self._pid: int | None = None

    def get(self) -> T:
        if self._pid != os.getpid():
            self._value, self._pid = self.make(), os.getpid()
        return self._value

    def __reduce__(self) -> tuple[type, tuple[Callable[[], T]]]:
        return PerProcess, (self.make,)


class Names:
    """Many names in one array, which loading processes share. They would copy a list of text, page by page."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(bytes(self._names[index]))


class FolderFiles:
    """Files of a folder, by number.

    Args:
        path: the folder.
        names: path of each file inside it.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.path, self.names = path, Names(names)

    def path_of(self, index: int) -> str:
        """The file's path, for messages."""
        return str(self.path / self.names[index])

    def read(self, index: int) -> bytes:
        """The file's content. DamagedFile if there is no such file, or no regular one."""
        try:
            return read_bytes(self.path / self.names[index], FILE_BYTES)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it has more bytes than the file of an image"
            raise DamagedFile(f"cannot read {self.path_of(index)}: {reason}") from None


class ZipFiles:
    """Files of a zip without compression, by number. Every read checks the CRC that the zip stores.

    Args:
        archive: the open zip. Only positions are kept, 20 bytes per file.
        path: of the zip.
        names: path of each file inside it.

    Raises:
        ValueError: a file is compressed.
    """

    def __init__(self, archive: zipfile.ZipFile, path: Path, names: Sequence[str]) -> None:
        found = {info.filename: info for info in archive.infolist()}
        infos = [found.get(name) for name in names]
        compressed = next((i.filename for i in infos if i is not None and i.compress_type != zipfile.ZIP_STORED), None)
        if compressed is not None:
            raise ValueError(f"{path} compresses {compressed!r}; accepted: a zip without compression (zip -0)")
        self.path, self.names = path, Names(names)
        self._file = PerProcess(functools.partial(_open_unbuffered, path))
        size = os.fstat(self._file.get().fileno()).st_size
        beyond = next((i for i in infos if i is not None and max(i.file_size, i.header_offset) > size), None)
        if beyond is not None:
            raise ValueError(
                f"{path}: {beyond.filename!r} is said to have {beyond.file_size} bytes, and the zip has {size}"
            )
        self._offsets = np.array([-1 if info is None else info.header_offset for info in infos], np.int64)
        self._sizes = np.array([0 if info is None else info.file_size for info in infos], np.int64)
        self._checks = np.array([0 if info is None else info.CRC for info in infos], np.uint32)

    def path_of(self, index: int) -> str:
        return f"{self.path}/{self.names[index]}"

    def read(self, index: int) -> bytes:
        offset, size = int(self._offsets[index]), int(self._sizes[index])
        if offset < 0:
            raise DamagedFile(f"cannot read {self.path_of(index)}: no such file in the zip")
        descriptor = self._file.get().fileno()
        header = os.pread(descriptor, LOCAL_HEADER.size, offset)
        if len(header) == LOCAL_HEADER.size:
            _, name, extra = LOCAL_HEADER.unpack(header)
            data = os.pread(descriptor, size, offset + LOCAL_HEADER.size + name + extra)
            if zlib.crc32(data) == self._checks[index]:
                return data
        raise DamagedFile(f"cannot read {self.path_of(index)}: it differs from the zip's own checksum")


def _open_unbuffered(path: Path) -> IO[bytes]:
    with open_regular(path) as file:
        return os.fdopen(os.dup(file.fileno()), "rb", buffering=0)


@contextmanager
def open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """A zip as long as the block lasts.

    Raises:
        ValueError: it is damaged or no zip, also if that shows within the block.
    """
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            yield archive
    except (ValueError, KeyError):  # of the block
        raise
    except Exception as error:  # a damaged zip raises BadZipFile, zlib.error, EOFError, NotImplementedError and others
        raise ValueError(f"{path} is damaged or no zip: {_why(path, error)}") from None


def _why(path: Path, error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    known = kind_of_file(path)
    return one_line(error) if known is None or "zip" in known else known


Files = FolderFiles | ZipFiles


def read_npy(files: Files, index: int) -> Array:
    """The array in one ``.npy`` of ``files``. DamagedFile if it cannot be read."""
    data = files.read(index)
    try:
        return parse_npy(io.BytesIO(data), len(data))
    except ValueError as error:
        known = None if data.startswith(np.lib.format.MAGIC_PREFIX) else kind_of(data)
        reason = known or one_line(error)
        raise DamagedFile(f"cannot read {files.path_of(index)}: {reason}") from None
