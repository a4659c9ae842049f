"""A folder of images: one class per subfolder, or one class without subfolders."""

from pathlib import Path

import numpy as np
from torch import Tensor

from dcdit.data.decode import ImageFile, read_image
from dcdit.data.listing import image_files
from dcdit.data.samples import DamagedFile, Split, StoredSamples, sample_rng, to_sample

MAX_SIDE = 8192
"""Largest size to which images are cropped."""
MAX_PIXELS = 4 * MAX_SIDE**2
"""Of an image while it is resized: one GiB."""


class ImageFolder(StoredSamples):
    """Images of a folder. The shorter side is resized to ``size`` and a square is cropped, at random while training.

    Args:
        path: folder whose subfolders are the classes, or a flat folder of images (class 0); see :func:`image_files`.
        size: pixels per side.
        split: ``"train"`` or ``"held_out"``.
        held_out: fraction of the images in the held-out split.
        flip: mirror training images at random.
        seed: sample n is a pure function of (seed, n).
        skip_damaged: skip files that cannot be read, with a warning, instead of stopping.

    Raises:
        FileNotFoundError, ValueError: see :func:`image_files`. When a sample is read: a file that is no image.

    Example:
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from dcdit.data import ImageFolder
        >>> for name, colour in (("black", 0), ("white", 255)):
        ...     Path("images", name).mkdir(parents=True)
        ...     Image.new("L", (8, 8), colour).save(f"images/{name}/0.png")
        >>> dataset = ImageFolder("images", size=4, held_out=0)
        >>> dataset.class_names
        ('black', 'white')
        >>> sorted((label, x.unique().tolist()) for x, label in (dataset[0], dataset[1]))  # pixels in [-1, 1]
        [(0, [-1.0]), (1, [1.0])]
    """

    def __init__(
        self,
        path: str | Path,
        size: int = 256,
        split: str = "train",
        held_out: float = 0.1,
        flip: bool = True,
        seed: int = 0,
        skip_damaged: bool = False,
    ) -> None:
        check_size(size)
        self.files, self.labels, self.class_names = image_files(Path(path))
        self.split = Split(split, len(self.files), held_out, seed, path)
        self.shape = (3, size, size)
        self.random = split == "train"
        self.flip = flip and self.random
        self.seed = seed
        self.skip_damaged = skip_damaged

    def load(self, item: int, n: int) -> tuple[Tensor, int]:
        rng = sample_rng(self.seed, n)
        position = rng.random() if self.random else 0.5
        pixels = read_square(self.files[item], self.shape[1], position)
        if self.flip and rng.integers(2):
            pixels = pixels[:, ::-1]
        return to_sample(pixels), self.labels[item]


def check_size(size: int) -> None:
    """ValueError for a size to which no image is cropped."""
    if not 1 <= size <= MAX_SIDE:
        raise ValueError(f"size is {size}; accepted: 1 to {MAX_SIDE} pixels")


def read_rgb(path: Path) -> np.ndarray:
    """The whole image as uint8 (H, W, 3). DamagedFile if it cannot be read."""
    return np.asarray(read_image(path))


def read_square(path: ImageFile, size: int, position: float) -> np.ndarray:
    """A square of the image, at ``position`` in [0, 1] along its longer side, as uint8 (size, size, 3).

    DamagedFile if it cannot be read.
    """
    from dcdit.utils.pillow import Image

    # With a draft size the JPEG decoder skips resolution that the resize would discard.
    rgb = read_image(path, draft=(2 * size, 2 * size))
    width, height = rgb.size
    side = min(width, height)
    left, top = position * (width - side), position * (height - side)
    box = (left, top, left + side, top + side)
    return np.asarray(rgb.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0))


def read_centre(path: Path, size: int) -> np.ndarray:
    """The centre of the image as uint8 (size, size, 3), cropped and resized as DiT and ADM do (arXiv 2105.05233).

    DamagedFile if it cannot be read.
    """
    from dcdit.utils.pillow import Image

    rgb = read_image(path)
    while min(rgb.size) >= 2 * size:
        rgb = rgb.resize((rgb.width // 2, rgb.height // 2), Image.Resampling.BOX)
    scale = size / min(rgb.size)
    width, height = round(rgb.width * scale), round(rgb.height * scale)
    if width * height > MAX_PIXELS:
        raise DamagedFile(
            f"cannot read image {str(path)!r}: it has {width}x{height} pixels when it is resized for size {size}; "
            f"accepted: at most {MAX_PIXELS}"
        )
    rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (rgb.width - size) // 2, (rgb.height - size) // 2
    return np.asarray(rgb.crop((left, top, left + size, top + size)))
