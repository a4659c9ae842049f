"""A dataset from the ``data`` section of a configuration."""

from typing import Protocol

from dcdit.data.cifar10 import Cifar10
from dcdit.data.digits import Digits
from dcdit.data.folder import ImageFolder
from dcdit.data.latents import LatentDataset
from dcdit.data.npz import NpzDataset
from dcdit.data.photographs import Photographs
from dcdit.data.samples import Samples
from dcdit.data.stream import StreamDataset


class DatasetOptions(Protocol):
    """What :func:`create_dataset` reads; :class:`dcdit.config.DataSection` has all of it and says what it means.

    Example:
        >>> from dcdit.config import DataSection
        >>> from dcdit.data import DatasetOptions
        >>> options: DatasetOptions = DataSection(kind="photographs", size=32)
        >>> options.kind, options.size, options.flip
        ('photographs', 32, True)
    """

    kind: str
    path: str | None
    size: int
    downscale: int
    flip: bool
    held_out: float
    scale: float | None
    skip_damaged: bool
    column: str | None
    label_column: str | None
    classes: list[str] | None
    shuffle_buffer: int
    held_out_path: str | None


def create_dataset(
    section: DatasetOptions, split: str = "train", seed: int = 0, num_classes: int | None = None
) -> Samples:
    """The dataset that a configuration describes.

    Args:
        section: the ``data`` section.
        split: ``"train"`` or ``"held_out"``.
        seed: sample n is a pure function of (seed, n).
        num_classes: of the model, for streams that do not say how many classes they have.

    Raises:
        FileNotFoundError, ValueError: nothing readable at ``data.path``, or the options do not fit the data.

    Example:
        >>> from dcdit.config import DataSection
        >>> from dcdit.data import create_dataset
        >>> dataset = create_dataset(DataSection(kind="photographs", size=32), split="held_out")
        >>> type(dataset).__name__, dataset.shape
        ('Photographs', (3, 32, 32))
    """
    if section.kind == "photographs":
        return Photographs(section.size, section.downscale, split, section.held_out, section.flip, seed)
    if section.kind == "digits":
        return Digits(section.size, split, section.held_out, seed)
    if section.path is None:
        raise ValueError(f"data.path is null; data.kind={section.kind!r} needs one")
    if section.kind == "cifar10":
        return Cifar10(section.path, split, section.flip, seed)
    stored = (split, section.held_out, section.flip, seed)
    if section.kind == "stream":
        return StreamDataset(
            section.path,
            section.size,
            *stored,
            section.scale,
            section.skip_damaged,
            section.column,
            section.label_column,
            section.classes,
            num_classes,
            section.shuffle_buffer,
            section.held_out_path,
        )
    if section.kind == "latents":
        return LatentDataset(section.path, *stored, section.scale, section.skip_damaged)
    if section.kind == "npz":
        return NpzDataset(section.path, *stored)
    return ImageFolder(section.path, section.size, *stored, section.skip_damaged)
