"""Names of files that a file lists."""

from pathlib import PurePath
from typing import Any


def is_inside(name: Any) -> bool:
    """Whether a name that a file lists stays in the folder of that file. A file never decides what else is read."""
    return isinstance(name, str) and not PurePath(name).is_absolute() and ".." not in PurePath(name).parts
