"""Names of files that a file lists."""

from pathlib import PurePath
from typing import Any


def is_inside(name: Any) -> bool:
    """Whether a name that a file lists stays in the folder of that file. A file never decides what else is read.

    Links are followed wherever they lead: whoever made the folder has put them there, as the cache of Hugging Face
    does with every file, and no file that is read makes one.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    return not PurePath(name).is_absolute() and ".." not in PurePath(name).parts
