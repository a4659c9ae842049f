"""What a command prints never decides whether its work gets done."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any


class _Descriptor(io.RawIOBase):
    """Bytes to a file descriptor, which stays open. A reader that has gone, as that of ``| head``, is no error."""

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor, self._name = descriptor, name

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        try:
            return os.write(self._descriptor, data)
        except BrokenPipeError:
            return len(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._name) from None


@contextlib.contextmanager
def lenient_output() -> Iterator[None]:
    """Print inside the block without errors for what nobody reads, or for characters that a terminal does not have.

    The characters are escaped. A pipe that was closed takes the rest of the output in silence. Other errors, as of a
    full disk, are raised where the output is written or flushed.
    """
    outer = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_lenient, outer)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        sys.stdout, sys.stderr = outer


def _lenient(stream: Any) -> Any:
    if stream is None:  # the program was started with a closed descriptor
        return io.StringIO()
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    raw = getattr(stream.buffer, "raw", stream.buffer)
    if not isinstance(raw, io.FileIO):  # a test, or a program that collects output
        stream.reconfigure(errors="backslashreplace")
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Descriptor(raw.fileno(), stream.name)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
