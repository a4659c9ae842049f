"""A folder of images: one class per subfolder, or one class without subfolders."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from dcdit.data.samples import DamagedFile, Split, StoredSamples, sample_rng, to_sample

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class ImageFolder(StoredSamples):
    """Images of a folder. The shorter side is resized to ``size`` and a square is cropped, at random while training.

    Args:
        path: folder whose subfolders are the classes (in alphabetical order), or a flat folder of images (class 0).
        size: pixels per side.
        split: ``"train"`` or ``"held_out"``.
        held_out: fraction of the images in the held-out split.
        flip: mirror training images at random.
        seed: sample n is a pure function of (seed, n).
        skip_damaged: skip files that cannot be read, with a warning, instead of stopping.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no image in it, or images beside class folders. When a sample is read: a file that is no image.
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
        if size < 1:
            raise ValueError(f"size is {size}; accepted: at least 1 pixel")
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


def image_files(path: Path) -> tuple[list[Path], list[int], tuple[str, ...]]:
    """(files, label of each, name of each label). Errors as in :class:`ImageFolder`."""
    if not path.is_dir():
        raise FileNotFoundError(f"no image folder {str(path)!r}")
    flat = _images_in(path)
    classes = {folder.name: _images_in(folder) for folder in sorted(path.iterdir()) if folder.is_dir()}
    classes = {name: files for name, files in classes.items() if files}
    if flat and classes:
        raise ValueError(f"{path} holds images beside class folders ({next(iter(classes))!r}); only one of the two")
    if not flat and not classes:
        raise ValueError(f"no images in {str(path)!r}; accepted: {', '.join(SUFFIXES)}, in it or in class folders")
    classes = classes or {path.name: flat}
    files = [file for group in classes.values() for file in group]
    labels = [label for label, group in enumerate(classes.values()) for _ in group]
    return files, labels, tuple(classes)


def _images_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("[!.]*") if file.suffix.lower() in SUFFIXES)


def read_rgb(path: Path) -> np.ndarray:
    """The whole image as uint8 (H, W, 3)."""
    return np.asarray(_open(path))


def read_square(path: Path, size: int, position: float) -> np.ndarray:
    """A square of the image, at ``position`` in [0, 1] along its longer side, as uint8 (size, size, 3)."""
    from PIL import Image

    # With a draft size the JPEG decoder skips resolution that the resize would discard.
    rgb = _open(path, draft=(2 * size, 2 * size))
    width, height = rgb.size
    side = min(width, height)
    left, top = position * (width - side), position * (height - side)
    box = (left, top, left + side, top + side)
    return np.asarray(rgb.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0))


def read_centre(path: Path, size: int) -> np.ndarray:
    """The centre of the image as uint8 (size, size, 3), cropped and resized as DiT and ADM do it (arXiv 2105.05233)."""
    from PIL import Image

    rgb = _open(path)
    while min(rgb.size) >= 2 * size:
        rgb = rgb.resize((rgb.width // 2, rgb.height // 2), Image.Resampling.BOX)
    scale = size / min(rgb.size)
    rgb = rgb.resize((round(rgb.width * scale), round(rgb.height * scale)), Image.Resampling.BICUBIC)
    left, top = (rgb.width - size) // 2, (rgb.height - size) // 2
    return np.asarray(rgb.crop((left, top, left + size, top + size)))


def _open(path: Path, draft: tuple[int, int] | None = None) -> "Image.Image":
    from PIL import Image

    try:
        with Image.open(path) as image:
            if draft is not None:
                image.draft("RGB", draft)
            return image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DamagedFile(f"cannot read image {str(path)!r}: {' '.join(str(error).split())}") from None
