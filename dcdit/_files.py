"""Files that appear whole or not at all."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` make a file or folder beside ``path``, force it to disk, and only then give it the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        write(new)
        _sync(new)
        if path.is_dir():
            # A folder cannot be replaced in one step: the old one steps aside first.
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            path.rename(old)
            new.rename(path)
            shutil.rmtree(old)
        else:
            new.replace(path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(new) if new.is_dir() else new.unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
