"""Files of ``torch.save``. Nothing in them is run: they may hold tensors and plain values only."""

import io
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dcdit.utils.reading import BEGINNING, kind_of, open_regular
from dcdit.utils.text import printable

GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
"""The name of what a pickle would run, in PyTorch's message."""
ADVICE = (
    "accepted: tensors and plain values, as its author gets from torch.save(model.state_dict(), ...), or safetensors"
)
NAMED = 3
"""Names in a message; it counts all of them."""


def load_pickled(path: str | Path, allowed: Sequence[type] = ()) -> Any:
    """What ``torch.save`` wrote, on the CPU.

    Args:
        allowed: classes that may be in it besides tensors and plain values.

    Raises:
        FileNotFoundError: nothing there.
        OSError: it cannot be opened, or is no regular file.
        ValueError: a damaged file, one of another kind, or one that would run code; the message says what.
    """
    path = Path(path)
    try:
        with open_regular(path) as file:
            return _load(path, file, allowed)
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {str(path)!r}") from None


def _load(path: Path, file: BinaryIO, allowed: Sequence[type]) -> Any:
    beginning = file.read(BEGINNING)
    zipped = beginning.startswith(b"PK")
    problem = _archive_problem(file) if zipped else None
    if problem is not None:
        raise ValueError(f"{path} {problem}; {ADVICE}")
    try:
        file.seek(0)
        with torch.serialization.safe_globals([*allowed]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except RecursionError:
        raise ValueError(f"{path} is nested too deep; {ADVICE}") from None
    except Exception as error:  # PyTorch raises errors of many kinds for a damaged file
        refused = GLOBAL.search(str(error))
        if refused is not None:
            names = list(dict.fromkeys([refused[1], *_globals(file)]))
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            shown = printable(", ".join(names[:NAMED]) + more)
            raise ValueError(f"{path} is refused, because loading it would call {shown}; {ADVICE}") from None
        # PyTorch's own message advises to switch the check off, so it is not repeated.
        what = "it is damaged" if zipped else kind_of(beginning) or "it is damaged, or of another kind"
        raise ValueError(f"{path} cannot be read as a file of torch.save: {what}; {ADVICE}") from None


def _archive_problem(file: BinaryIO) -> str | None:
    """What is wrong with a zip before it is unpacked; None if nothing. ``torch.save`` does not compress."""
    size = file.seek(0, io.SEEK_END)
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except Exception:  # a damaged zip raises anything in zipfile
        return "is a damaged zip archive, perhaps cut short"
    if any(info.filename.endswith("/constants.pkl") for info in infos):
        return "is TorchScript, which is code"
    packed = next((info for info in infos if info.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        return f"compresses {packed.filename!r}, as torch.save never does"
    said = sum(info.file_size for info in infos)
    return f"is damaged: its parts are said to have {said} bytes, and it has {size}" if said > size else None


def _globals(file: BinaryIO) -> list[str]:
    """All that a pickle would call and may not."""
    try:
        file.seek(0)
        return torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # of files of old versions there is no list
        return []


def check_dense(tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Refuse tensors that are no plain arrays, or that claim more numbers than the file holds.

    Raises:
        ValueError: names the source and the tensor.
    """
    for name, tensor in tensors.items():
        kind = None
        if tensor.layout != torch.strided or tensor.is_quantized:
            kind = "quantized" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
        elif tensor.device.type != "cpu":
            kind = f"on the device {tensor.device.type}"
        elif tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            kind = f"said to have the shape {tuple(tensor.shape)}, and has {tensor.untyped_storage().nbytes()} bytes"
        if kind is not None:
            raise ValueError(f"{source}: {name!r} is {kind}; accepted: dense tensors with all of their numbers")
