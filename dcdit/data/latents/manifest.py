"""``manifest.json`` beside shards of latents: what they were made from and how, and the checksum of every file."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dcdit.utils.files import write_text
from dcdit.utils.inside import is_inside
from dcdit.utils.reading import read_json, sha256
from dcdit.utils.schema import check_types, from_mapping

MANIFEST_FILE = "manifest.json"
ENTRY = ".entry.json"
"""End of the name of a file that holds the entry of one shard, until the manifest has it."""
FORMAT = "dcdit-latents-1"


@dataclass(frozen=True)
class ShardEntry:
    """One finished shard."""

    file: str
    images: int
    bytes: int
    sha256: str
    sum: list[float]
    """Per channel, over the latents that are not mirrored."""
    sum_of_squares: list[float]
    """The same of their squares."""

    def __post_init__(self) -> None:
        check_types(self)
        if not is_inside(self.file):
            raise ValueError(f"it lists {self.file!r}; accepted: files inside the folder")
        if self.images < 1 or self.bytes < 1:
            raise ValueError(f"{self.file!r} has {self.images} images and {self.bytes} bytes; accepted: at least 1")


@dataclass
class Manifest:
    """A set of latents, finished or not. The fields are the keys of the file."""

    images: int
    """Number of images in the whole set. If the shards hold fewer, the set is unfinished."""
    shape: list[int]
    """(C, H, W) of a latent."""
    shift: float
    """A model sees (latent - shift) * scale."""
    scale: float
    class_names: list[str]
    """Name of every label."""
    recipe: dict[str, Any]
    """All else that the latents depend on."""
    shards: list[ShardEntry] = field(default_factory=list)
    """Those that are finished, in order."""
    format: str = FORMAT

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"it has the format {self.format!r}; accepted: {FORMAT}")
        check_types(self)
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(f"shape is {self.shape}; accepted: [C, H, W], positive integers")
        if self.images < 1 or not self.scale:
            raise ValueError(f"images is {self.images} and scale {self.scale}; accepted: at least 1, and not 0")

    @property
    def done(self) -> int:
        """Number of images in finished shards."""
        return sum(shard.images for shard in self.shards)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder; None if it has none. ValueError if it is not readable, or values are of other types."""
    path = folder / MANIFEST_FILE
    if not os.path.lexists(path):
        return None
    data = read_json(path)
    try:
        shards = data.get("shards") if isinstance(data, dict) else None
        if isinstance(shards, list):
            data = {**data, "shards": [from_mapping(ShardEntry, shard, "a shard") for shard in shards]}
        return from_mapping(Manifest, data, "the manifest")
    except ValueError as error:
        raise ValueError(f"{path} is not readable: {error}") from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``. It appears complete or not at all."""
    write_text(folder / MANIFEST_FILE, json.dumps(dataclasses.asdict(manifest), indent=1))


def write_entry(folder: Path, shard: ShardEntry) -> None:
    """Write a file beside a shard with its entry, for the process that writes the manifest."""
    write_text(_entry_file(folder, shard.file), json.dumps(dataclasses.asdict(shard)))


def read_entries(folder: Path) -> dict[str, ShardEntry]:
    """What :func:`write_entry` wrote, by the shards' file names. Other files of such names are ignored."""
    found = {}
    for file in sorted(folder.glob(f"*{ENTRY}")):
        with contextlib.suppress(ValueError, OSError):
            shard = from_mapping(ShardEntry, read_json(file), "a shard")
            if file == _entry_file(folder, shard.file):
                found[shard.file] = shard
    return found


def remove_entries(folder: Path, names: Iterable[str]) -> None:
    """Remove what :func:`write_entry` wrote for these shards."""
    for name in read_entries(folder).keys() & set(names):
        _entry_file(folder, name).unlink()


def _entry_file(folder: Path, name: str) -> Path:
    return folder / f"{name.removesuffix('.safetensors')}{ENTRY}"


def size_problem(folder: Path, shard: ShardEntry) -> str | None:
    """What is wrong with a shard, judged by its size alone; None if nothing."""
    path = folder / shard.file
    if not path.is_file():
        return f"{path} {'is no regular file' if path.exists() else 'is missing'}"
    size = path.stat().st_size
    return None if size == shard.bytes else f"{path} has {size} bytes, the manifest says {shard.bytes}"


def content_problem(folder: Path, shard: ShardEntry, progress: Callable[[int], Any]) -> str | None:
    """What is wrong with a shard, judged by every byte of it; None if nothing.

    Args:
        progress: called with the number of bytes after each block.
    """
    found = size_problem(folder, shard)
    if found is None and sha256(folder / shard.file, progress) != shard.sha256:
        found = f"{folder / shard.file} has another SHA-256 than the manifest says"
    return found
