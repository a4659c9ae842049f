"""Random crops of the colour photographs inside the scikit-image package. Read from disk, never downloaded."""

import importlib.util
from pathlib import Path

import numpy as np
from torch import Tensor

from dcdit.data.decode import read_image
from dcdit.data.samples import Samples, check_split, sample_rng, to_sample

FILES = {
    "astronaut": "astronaut.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "rocket": "rocket.jpg",
    "galaxies": "hubble_deep_field.jpg",
    "motorcycle": "motorcycle_left.png",
}


class Photographs(Samples):
    """One class per photograph; sample n is a random crop of a random one.

    Each photograph is cut in two along its longer side. The strip at its end is held out, and no training crop reaches
    into it. So few photographs show that the mechanism works, not that it generalises.

    Args:
        size: pixels per side of a crop.
        downscale: whole factor by which each part is shrunk first, so that small crops show content.
        split: ``"train"`` or ``"held_out"``.
        held_out: fraction of the longer side that is held out. The strip is at least one crop wide; 0 holds out none.
        flip: mirror training crops at random.
        seed: sample n is a pure function of (seed, n); held-out samples do not depend on it.

    Raises:
        ModuleNotFoundError: scikit-image is missing.
        FileNotFoundError: this scikit-image carries no such photograph.
        ValueError: a photograph is too small for the crop, or a bad argument.

    Example:
        >>> import torch
        >>> from dcdit.data import Photographs
        >>> dataset = Photographs(size=32)
        >>> dataset.class_names
        ('astronaut', 'cat', 'coffee', 'rocket', 'galaxies', 'motorcycle')
        >>> x, label = dataset[5]
        >>> x.shape, torch.equal(x, Photographs(size=32)[5][0])  # sample 5 of seed 0, whenever it is asked for
        (torch.Size([3, 32, 32]), True)
    """

    def __init__(
        self,
        size: int = 64,
        downscale: int = 2,
        split: str = "train",
        held_out: float = 0.2,
        flip: bool = True,
        seed: int = 0,
    ) -> None:
        check_split(split)
        if size < 1 or downscale < 1:
            raise ValueError(f"size is {size} and downscale {downscale}; accepted: whole numbers of at least 1")
        if not 0 <= held_out < 1 or (held_out == 0 and split == "held_out"):
            raise ValueError(
                f"held_out is {held_out} for split {split!r}; accepted: a fraction in (0, 1), or 0 to train on all"
            )
        self.shape = (3, size, size)
        self.class_names = tuple(FILES)
        self.flip = flip and split == "train"
        self.seed = seed if split == "train" else 0
        self.parts = [_part(name, size, downscale, split, held_out) for name in FILES]

    def __getitem__(self, n: int) -> tuple[Tensor, int]:
        rng = sample_rng(self.seed, n)
        label = int(rng.integers(len(self.parts)))
        part, size = self.parts[label], self.shape[1]
        top = int(rng.integers(part.shape[0] - size + 1))
        left = int(rng.integers(part.shape[1] - size + 1))
        crop = part[top : top + size, left : left + size]
        if self.flip and rng.integers(2):
            crop = crop[:, ::-1]
        return to_sample(crop), label


def split_box(width: int, height: int, crop: int, split: str, held_out: float) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the part of a photograph that belongs to a split.

    Args:
        crop: side of a crop, in pixels of the photograph.
        held_out: as in :class:`Photographs`.

    Raises:
        ValueError: the part is too small for a crop.
    """
    longer = max(width, height)
    strip = max(round(longer * held_out), crop) if held_out else 0
    lo, hi = (0, longer - strip) if split == "train" else (longer - strip, longer)
    if hi - lo < crop or min(width, height) < crop:
        raise ValueError(
            f"{width}x{height} pixels are too few for a {split} part that fits crops of {crop}x{crop} of them"
        )
    return (lo, 0, hi, height) if width >= height else (0, lo, width, hi)


def _part(name: str, size: int, downscale: int, split: str, held_out: float) -> np.ndarray:
    path = _folder() / FILES[name]
    if not path.is_file():
        raise FileNotFoundError(f"this scikit-image has no {path}; photographs are never downloaded")
    photograph = read_image(path)
    try:
        box = split_box(*photograph.size, size * downscale, split, held_out)
    except ValueError as error:
        raise ValueError(f"photograph {name!r}: {error} (size {size}, downscale {downscale})") from None
    # Crop first, then shrink: otherwise the filter would mix held-out pixels into training pixels.
    return np.asarray(photograph.crop(box).reduce(downscale))


def _folder() -> Path:
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("the photographs are files of scikit-image: pip install 'dcdit[demo]'")
    return Path(package.origin).parent / "data"
