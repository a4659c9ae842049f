"""``manifest.json`` beside shards of latents: what they were made from and how, and what every file must be."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dcdit.utils.files import atomically

NAME = "manifest.json"
FORMAT = "dcdit-latents-1"
BLOCK = 1 << 20


@dataclass(frozen=True)
class ShardEntry:
    """One finished file."""

    file: str
    images: int
    bytes: int
    sha256: str
    sum: list[float]
    """Per channel, over the latents that are not mirrored."""
    sum_of_squares: list[float]


@dataclass
class Manifest:
    """Attributes:
    images: how many the whole set has; fewer in the shards means that it is unfinished.
    shape: (C, H, W) of a latent.
    shift, scale: a model sees (latent - shift) * scale.
    class_names: name of every label.
    recipe: all else that the latents follow from.
    shards: those that are done, in order.
    """

    images: int
    shape: list[int]
    shift: float
    scale: float
    class_names: list[str]
    recipe: dict[str, Any]
    shards: list[ShardEntry] = field(default_factory=list)
    format: str = FORMAT

    @property
    def done(self) -> int:
        return sum(shard.images for shard in self.shards)


def read(folder: Path) -> Manifest | None:
    """The manifest of a folder, or None where there is none. ValueError where it is not readable."""
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        manifest = Manifest(**{**data, "shards": [ShardEntry(**shard) for shard in data["shards"]]})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not readable: {' '.join(str(error).split())}") from None
    if manifest.format != FORMAT:
        raise ValueError(f"{path} has the format {manifest.format!r}; accepted: {FORMAT}")
    return manifest


def write(folder: Path, manifest: Manifest) -> None:
    text = json.dumps(dataclasses.asdict(manifest), indent=1)
    atomically(folder / NAME, lambda file: file.write_text(text, encoding="utf-8"))


def size_problem(folder: Path, shard: ShardEntry) -> str | None:
    """What is wrong with a shard as far as its size tells, or None."""
    path = folder / shard.file
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    return None if size == shard.bytes else f"{path} has {size} bytes, the manifest says {shard.bytes}"


def content_problem(folder: Path, shard: ShardEntry, progress: Callable[[int], Any]) -> str | None:
    """What is wrong with a shard, every byte of it read, or None. ``progress`` is told how many."""
    found = size_problem(folder, shard)
    if found is None and sha256(folder / shard.file, progress) != shard.sha256:
        found = f"{folder / shard.file} has another SHA-256 than the manifest says"
    return found


def sha256(path: Path, progress: Callable[[int], Any] = lambda count: None) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()
