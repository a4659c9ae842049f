"""One process at a time in a folder. A crash releases the lock, and it holds between the clients of NFS."""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

LOCK_FILE = ".dcdit-lock"
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors of a file system without locks."""

_held: set[int] = set()
"""Descriptors of the lock files of this process."""


class FolderInUseError(OSError):
    """Another process holds the lock of a folder. The message names it."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of an existing folder.

    The lock is ``flock`` on a file in the folder, which Linux passes on to the server of an NFS folder. The file names
    the holder and is deleted at the end; after a crash it stays behind, unlocked.

    Yields:
        Whether the lock is held; False on a file system without locks.

    Raises:
        FolderInUseError: another process, or another place in this process, holds the lock.
        OSError: the folder is missing, or no file can be written there.
    """
    path = folder / LOCK_FILE
    descriptor = _acquire(path)
    if descriptor is None:
        yield False
        return
    _held.add(descriptor)
    try:
        yield True
    finally:
        # A forked process inherits this block, but not the lock.
        if descriptor in _held:
            _held.remove(descriptor)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    path.unlink()
            os.close(descriptor)


def _acquire(path: Path) -> int | None:
    """The descriptor of the locked lock file, or None where the file system has no locks."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            supported = _flock(descriptor, path)
            state = os.fstat(descriptor)
            if supported and state.st_nlink:
                os.ftruncate(descriptor, 0)
                holder = f"process {os.getpid()} on host {socket.gethostname()} since {time.strftime('%F %T')}"
                os.write(descriptor, holder.encode())
                return descriptor
            if not supported and not state.st_size:
                path.unlink(missing_ok=True)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if not supported:
            return None
        # The file that was opened had just been deleted by its holder, so it locks nothing.


def _flock(descriptor: int, path: Path) -> bool:
    """Lock a file; returns whether its file system can do that. FolderInUseError if another process holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        holder = os.read(descriptor, 1000).decode(errors="replace") or "another process"
        raise FolderInUseError(
            f"{path.parent} is in use by {holder}; accepted: another folder, or the same once that process has ended"
        ) from None
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return False
    return True


def _close_in_child() -> None:
    """Close the lock files that a forked process inherited, or the locks would outlive a killed parent in it."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
