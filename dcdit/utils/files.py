"""Files and folders that appear whole or not at all, whenever the process is killed.

What is not in place yet, or not any more, stands beside its place under ``.<name>.<process>.<what>``: ``new`` is being
written, ``old`` is complete and waits for its replacement, ``gone`` is being deleted. A kill leaves them behind.
Readers ignore them, except an ``old`` whose name is free (:func:`stood_aside`).
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` make a file or folder beside ``path``, force it to disk, and only then give it the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = _beside(path, "new"), _beside(path, "old")
    try:
        write(new)
        _sync(new)
        if path.is_dir():
            # A folder cannot be replaced in one step: the old one steps aside first.
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
    """Delete a file or folder, if there is one; a folder loses its name before it loses its files."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    gone = path if path.suffix == ".gone" else _beside(path, "gone")
    path.rename(gone)
    shutil.rmtree(gone)


def stood_aside(folder: Path) -> dict[str, Path]:
    """What was being replaced in ``folder`` when a process was killed, by the name it had, which nothing has now."""
    found = {path.name[1:].rsplit(".", 2)[0]: path for path in folder.glob(".*.[0-9]*.old")}
    return {name: path for name, path in found.items() if not (folder / name).exists()}


def recover(folder: Path) -> None:
    """Tidy up after a killed process, while no other one writes in ``folder``.

    What stood aside gets its name back; everything unfinished goes.
    """
    for name, path in stood_aside(folder).items():
        path.rename(folder / name)
    for what in ("new", "old", "gone"):
        for path in folder.glob(f".*.[0-9]*.{what}"):
            remove(path)


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name.removeprefix('.')}.{os.getpid()}.{what}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
