"""One rule for all writing: a file or folder appears complete or not at all, and nothing else is touched.

What is being written or deleted lies in a temporary folder beside its final name, ``.<32 hexadecimal digits>.dcdit``::

    .dcdit-lock     locked by the process that writes, so that another one can tell whether it was killed
    new/NAME        still being written
    old/NAME        the version that is being replaced, where that takes two steps
    gone/NAME       being deleted

The digits are random, so no two processes ever share such a folder, whatever host or container they run in. A killed
process leaves it behind. Readers ignore it, except for an ``old`` version whose name is free
(:func:`interrupted_replacements`), and :func:`recover` removes it.
"""

import contextlib
import errno
import os
import re
import shutil
import stat
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dcdit.utils.lock import LOCK_FILE, FolderInUseError, locked
from dcdit.utils.outputs import check_file_place, check_output_folder, make_folder

TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.dcdit")
NEW, OLD, GONE = "new", "old", "gone"
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EACCES)
"""Errors of file systems that do not force folders to disk, and of folders that may be written but not read."""


# --- writing and deleting -----------------------------------------------------------------------------------------


def atomically(path: Path, write: Callable[[Path], Any], clean: bool = True) -> None:
    """Write a file under a temporary name, force it to disk, and only then give it its final name.

    Args:
        path: its final name. An older file is replaced and its permissions are kept; a link is followed.
        write: called with another path of the same file name; makes the file there.
        clean: call :func:`recover` before, which lists the folder.

    Raises:
        ValueError, OSError: no file can be written there (:func:`~dcdit.utils.outputs.check_output_file`). The error
            names the path.
    """
    check_file_place(path)
    _replace(path, write, clean)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 as :func:`atomically` does. File names in it that are not UTF-8 keep their bytes."""
    atomically(path, lambda file: file.write_text(text, encoding="utf-8", errors="surrogateescape"))


def replace_folder(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a folder as :func:`atomically` writes a file.

    Args:
        path: its final name. What is there is replaced, so the caller has to know that it may be. A link is followed.
        write: called with another path of the same name; makes the folder there.
    """
    _replace(path, write, clean=True)


def remove_folder(path: Path) -> None:
    """Delete a folder; at every moment all of it is there, or none. The caller has to know that it may be deleted."""
    with _temporary_folder(path.parent) as temporary:
        (temporary / GONE).mkdir()
        path.rename(temporary / GONE / path.name)


def _replace(path: Path, write: Callable[[Path], Any], clean: bool) -> None:
    make_folder(path.parent)
    path = Path(os.path.realpath(path))
    if clean:
        recover(path.parent)
    with writing(path), _temporary_folder(path.parent) as temporary:
        new = temporary / NEW / path.name
        new.parent.mkdir()
        write(new)
        # What the writer chose does not count: safetensors makes files that nobody else may read.
        mode = path.stat().st_mode if path.is_file() else temporary.stat().st_mode & 0o666
        for file in [new] if new.is_file() else [part for part in new.rglob("*") if part.is_file()]:
            with contextlib.suppress(PermissionError):  # of file systems without permissions
                file.chmod(stat.S_IMODE(mode))
            _sync(file)
        _put_in_place(new, path, temporary)
        _sync(path.parent)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Let errors of the system inside the block name what is being written."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error


def _put_in_place(new: Path, path: Path, temporary: Path) -> None:
    if new.is_dir():
        _sync(new)
    try:
        new.replace(path)
    except OSError:
        # A folder with files in it takes two steps, and on some network file systems every replacement does.
        if not path.exists():
            raise
        old = temporary / OLD
        old.mkdir()
        path.rename(old / path.name)
        new.rename(path)
        old.rename(temporary / GONE)


def _sync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk. Where a file system does not do that for folders, skip it."""
    folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not folder or error.errno not in NO_FOLDER_SYNC:
            raise


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Be the only process that writes results into ``folder``, which is made if it is missing and cleaned up.

    Raises:
        FolderInUseError: another process is.
        ValueError, OSError: there can be no such folder.
    """
    made = not folder.exists()
    check_output_folder(folder)
    make_folder(folder)
    with contextlib.ExitStack() as stack:
        if made:
            stack.callback(_remove_empty, folder)
        if not stack.enter_context(locked(folder)):
            warnings.warn(f"{folder} is on a file system without locks: start one run in it at a time", stacklevel=3)
        recover(folder)
        yield


# --- temporary folders, and what a killed process leaves in them ----------------------------------------------------


@contextlib.contextmanager
def _temporary_folder(parent: Path) -> Iterator[Path]:
    """A locked temporary folder, which is cleared and removed at the end."""
    while True:
        temporary = parent / f".{uuid.uuid4().hex}.dcdit"
        temporary.mkdir()
        with contextlib.ExitStack() as stack:
            stack.callback(_remove_empty, temporary)
            try:
                stack.enter_context(locked(temporary))
            except (FolderInUseError, FileNotFoundError):
                continue  # recover() of another process saw the folder before it was locked
            stack.callback(_clear, temporary)
            yield temporary
            return


def interrupted_replacements(folder: Path) -> dict[str, Path]:
    """What a killed process was replacing in ``folder``: the old version by its final name, where that name is free."""
    found = (old for temporary in _temporary_folders(folder) for old in (temporary / OLD).glob("*"))
    return {old.name: old for old in found if not os.path.lexists(folder / old.name)}


def recover(folder: Path) -> None:
    """Clean up after killed processes in ``folder``. Processes that still write there are not disturbed.

    Old versions whose replacement was interrupted get their names back. All else that is unfinished is deleted.
    """
    for temporary in _temporary_folders(folder):
        # In use, just removed by another process, or of another user.
        with contextlib.suppress(FolderInUseError, FileNotFoundError, PermissionError):
            with locked(temporary) as held:
                if held:
                    _clear(temporary)
            _remove_empty(temporary)


def _temporary_folders(folder: Path) -> list[Path]:
    return [path for path in folder.glob(".*.dcdit") if TEMPORARY.fullmatch(path.name) and _is_ours(path)]


def _is_ours(path: Path) -> bool:
    """Whether a path of that name is a folder that holds nothing else than what this module puts there."""
    if path.is_symlink() or not path.is_dir():
        return False
    try:
        return {part.name for part in path.iterdir()} <= {LOCK_FILE, NEW, OLD, GONE}
    except (FileNotFoundError, PermissionError):
        return False


def _clear(temporary: Path) -> None:
    """Give an old version whose name is free its name back, and delete the rest, except for the lock."""
    old = temporary / OLD
    for version in old.glob("*"):
        if not os.path.lexists(temporary.parent / version.name):
            version.rename(temporary.parent / version.name)
    if old.exists():
        # From here on a half-deleted version can no longer pass for a complete one.
        old.rename(temporary / GONE)
    for name in (NEW, GONE):
        if (temporary / name).exists():
            shutil.rmtree(temporary / name)


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
