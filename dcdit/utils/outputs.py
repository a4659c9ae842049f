"""Where results must not go: what is refused before any work is done, so that nothing of the user's is lost."""

import os
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

from dcdit.utils.reading import read_json


def check_output_file(path: Path) -> None:
    """Refuse a path where no file can be written. An existing file is accepted: it will be replaced.

    Raises:
        ValueError: a folder, a device, a link that leads nowhere, or below a file.
        OSError: a file or folder that is write-protected, or no file can be made there, e.g. because the disk is full.
    """
    check_file_place(path)
    _check_writing(path, Path(os.path.realpath(path)).parent)


def check_output_folder(path: Path) -> None:
    """Refuse a path where no folder is and none can be made. Errors as in :func:`check_output_file`."""
    check_folder_place(path)
    _check_writing(path, path)


def _check_writing(path: Path, folder: Path) -> None:
    """Write a byte where ``path`` will be made. Permissions do not tell everything, least of all to root."""
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)) as file:
            file.write(b"0")
    except OSError as error:
        raise OSError(f"nothing can be written to {path}: {error.strerror}") from None


def check_file_place(path: Path) -> None:
    """The part of :func:`check_output_file` that writes nothing."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise ValueError(f"{path} is a folder; accepted: the name of a file")
    if target.is_symlink() or (path.is_symlink() and not target.parent.is_dir()):
        raise ValueError(f"{path} is a link that leads nowhere; accepted: a file, or a name that is free")
    if target.exists() and not target.is_file():
        raise ValueError(f"{path} is no regular file; accepted: a file, or a name that is free")
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(f"{path} is write-protected; accepted: a file that may be replaced")
    check_folder_place(target.parent)


def check_folder_place(path: Path) -> None:
    """The part of :func:`check_output_folder` that writes nothing."""
    existing = _existing(path)
    if not existing.is_dir():
        raise ValueError(f"{path} is no folder and cannot become one; accepted: a folder, or a name that is free")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{existing} is write-protected; accepted: a folder for the results")


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))


def make_folder(path: Path) -> None:
    """Make a folder and its parents where they are missing. Errors as in :func:`check_output_file`."""
    check_folder_place(path)
    path.mkdir(parents=True, exist_ok=True)


def check_not_read(output: Path, inputs: Mapping[str, str | Path | None]) -> None:
    """Refuse an output that is read as well, through links too, or that lies in a folder which is read.

    Args:
        inputs: name of an option -> its path, or None where it is not given.

    Raises:
        ValueError: names the output and the option.
    """
    place = Path(os.path.realpath(output))
    for option, path in inputs.items():
        read = None if path is None else Path(os.path.realpath(path))
        same = read is not None and place.exists() and read.exists() and place.samefile(read)
        if read is not None and (same or read in (place, *place.parents)):
            raise ValueError(f"{output} is where {option} is read from; accepted: another place for the results")


def check_own(folder: Path, record: str, keys: Collection[str], names: Collection[str]) -> None:
    """Refuse a folder that holds somebody else's files of the names that a command writes.

    A command writes its record, a JSON object, before everything else. So where there is such a record, the files are
    of an earlier call and may be replaced.

    Args:
        record: name of the record.
        keys: that it has.
        names: of the other files.

    Raises:
        ValueError: names the file, and what to do.
    """
    if _is_record(folder / record, keys):
        return
    for name in (record, *names):
        if os.path.lexists(folder / name):
            raise ValueError(f"{folder / name} is already there and would be replaced; accepted: another --out")


def _is_record(path: Path, keys: Collection[str]) -> bool:
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.keys() >= set(keys)
