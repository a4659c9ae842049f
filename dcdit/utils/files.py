"""Files and folders that appear complete or not at all, whenever the process is killed.

Until a step is complete, a file or folder has a temporary name beside its final one, ``.<name>.<process>.<stage>``.
``new`` is still being written; ``old`` is complete and is being replaced; ``gone`` is being deleted. A killed process
leaves them. Readers ignore them, except an ``old`` whose final name is free (:func:`interrupted_replacements`).
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

STAGES = ("new", "old", "gone")


def atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file or folder under a temporary name, force it to disk, and only then rename it to ``path``.

    Args:
        path: its final name; an older file or folder of that name is replaced.
        write: called with the temporary name; makes the file or folder there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = _temporary(path, "new"), _temporary(path, "old")
    try:
        write(new)
        _sync(new)
        if path.is_dir():
            # A folder cannot be replaced in one step, so the old one is renamed first.
            path.rename(old)
        new.replace(path)
        _sync(path.parent)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        remove(new)
        raise
    remove(old)


def remove(path: Path) -> None:
    """Delete a file or folder, if there is one. A folder is renamed before its files are deleted."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    gone = path if path.suffix == ".gone" else _temporary(path, "gone")
    path.rename(gone)
    shutil.rmtree(gone)


def interrupted_replacements(folder: Path) -> dict[str, Path]:
    """What a killed process was replacing in ``folder``: the old version by its final name, where that name is free."""
    found = {path.name[1:].rsplit(".", 2)[0]: path for path in folder.glob(".*.[0-9]*.old")}
    return {name: path for name, path in found.items() if not (folder / name).exists()}


def recover(folder: Path) -> None:
    """Clean up after a killed process. No other process may write in ``folder`` meanwhile.

    Old versions whose replacement was interrupted get their names back. All else that is unfinished is deleted.
    """
    for name, path in interrupted_replacements(folder).items():
        path.rename(folder / name)
    for stage in STAGES:
        for path in folder.glob(f".*.[0-9]*.{stage}"):
            remove(path)


def _temporary(path: Path, stage: str) -> Path:
    return path.with_name(f".{path.name.removeprefix('.')}.{os.getpid()}.{stage}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
