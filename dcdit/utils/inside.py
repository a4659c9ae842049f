"""Names of files that a file lists."""

from pathlib import Path, PurePath
from typing import Any

from dcdit.utils.reading import read_json


def is_inside(name: Any) -> bool:
    """Whether a name that a file lists stays in the folder of that file. A file never decides what else is read.

    Links are followed wherever they lead: whoever made the folder has put them there, as the cache of Hugging Face
    does with every file, and no file that is read makes one.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    return not PurePath(name).is_absolute() and ".." not in PurePath(name).parts


def listed_files(index: Path) -> list[str]:
    """The files that the index of sharded weights names, as transformers and diffusers write it.

    Raises:
        OSError: it cannot be opened.
        ValueError: it has no ``weight_map``, or names a file that is not inside its folder.
    """
    content = read_json(index)
    listed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(listed, dict):
        raise ValueError(f"{index} has no weight_map; accepted: names of weights to names of files")
    outside = next((name for name in listed.values() if not is_inside(name)), None)
    if outside is not None:
        raise ValueError(f"{index} lists {outside!r}; accepted: files inside the folder")
    return sorted(set(listed.values()))
