"""Files of tensors."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dcdit.utils.reading import kind_of_file, open_regular
from dcdit.utils.text import one_line


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file, as safetensors' ``safe_open`` gives it. What is read from it may be used after the block.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: it is damaged or no safetensors file, also if that shows within the block.
    """
    try:
        with open_regular(path) as file:
            # The file that is open, even if the path leads to another one by now.
            opened = f"/proc/self/fd/{file.fileno()}"
            with safe_open(opened if os.path.exists(opened) else path, framework="pt") as tensors:
                yield tensors
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {str(path)!r}") from None
    except (SafetensorError, OSError) as error:
        what = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        reason = kind_of_file(path) or what
        raise ValueError(f"{path} is damaged or no safetensors file: {reason}") from None


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it cannot be written, e.g. because the disk is full. safetensors has an error of its own for that.
    """
    try:
        save_file(dict(tensors), path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path.name}: {one_line(error)}") from None
