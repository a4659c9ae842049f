"""NumPy arrays of images, or of latents that some encoder made."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcdit.data.samples import Samples, Split, sample_rng, to_sample

Array = np.ndarray[Any, Any]
ARRAYS = ("images", "latents", "labels")


class NpzDataset(Samples):
    """An ``.npz`` with ``labels`` (N,) integer, and ``images`` (N, H, W, 3) uint8 or ``latents`` (N, C, H, W) float.

    An archive is held in memory. A folder of ``labels.npy`` and ``images.npy`` or ``latents.npy`` stays on disk and is
    mapped. Latents are returned as stored, in float32; only images are mirrored.

    Args:
        path: the archive or the folder, without pickled objects.
        split, held_out, flip, seed: as in :class:`dcdit.data.ImageFolder`.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: unreadable, or arrays that are missing or of another shape or type.
    """

    def __init__(
        self, path: str | Path, split: str = "train", held_out: float = 0.1, flip: bool = True, seed: int = 0
    ) -> None:
        arrays = read_arrays(Path(path))
        check_arrays(Path(path), arrays)
        self.holds_latents = "latents" in arrays
        self.values = arrays["latents" if self.holds_latents else "images"]
        self.labels = arrays["labels"]
        n, *rest = self.values.shape
        self.shape = tuple(rest) if self.holds_latents else (rest[2], rest[0], rest[1])
        self.class_names = tuple(str(label) for label in range(int(self.labels.max()) + 1))
        self.split = Split(split, n, held_out, seed, path)
        self.flip = flip and split == "train" and not self.holds_latents
        self.seed = seed

    def __getitem__(self, n: int) -> tuple[Tensor, int]:
        item = self.split.item(n)
        value, label = self.values[item], int(self.labels[item])
        if self.holds_latents:
            return torch.from_numpy(value.astype(np.float32)), label
        if self.flip and sample_rng(self.seed, n).integers(2):
            value = value[:, ::-1]
        return to_sample(value), label


def read_arrays(path: Path) -> dict[str, Array]:
    """``labels``, and ``images`` or ``latents``, of an archive or a folder, whatever their shapes.

    Errors as in :class:`NpzDataset`.
    """
    if not path.exists():
        raise FileNotFoundError(f"no dataset {str(path)!r}")
    try:
        if path.is_dir():
            names = sorted(file.stem for file in path.glob("*.npy"))
            arrays = {name: np.load(path / f"{name}.npy", mmap_mode="r") for name in names if name in ARRAYS}
        else:
            with np.load(path, allow_pickle=False) as archive:
                names = list(archive)
                arrays = {name: archive[name] for name in names if name in ARRAYS}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not readable as NumPy arrays: {' '.join(str(error).split())}") from None
    if len(arrays) != 2 or "labels" not in arrays:
        raise ValueError(f"{path} holds {names}; accepted: labels, and either images or latents")
    return arrays


def check_arrays(path: Path, arrays: dict[str, Array]) -> None:
    """ValueError for arrays of :func:`read_arrays` that have another shape or type."""
    name = "latents" if "latents" in arrays else "images"
    values, labels = arrays[name], arrays["labels"]
    if name == "latents" and (values.ndim != 4 or values.dtype.kind != "f"):
        raise ValueError(f"{path}: latents are {values.dtype} {values.shape}; accepted: float (N, C, H, W)")
    if name == "images" and (values.ndim != 4 or values.shape[3] != 3 or values.dtype != np.uint8):
        raise ValueError(f"{path}: images are {values.dtype} {values.shape}; accepted: uint8 (N, H, W, 3)")
    if labels.shape != values.shape[:1] or labels.dtype.kind not in "iu" or (labels.size and labels.min() < 0):
        raise ValueError(
            f"{path}: labels are {labels.dtype} {labels.shape}; accepted: {values.shape[0]} integers of at least 0"
        )
    if not labels.size:
        raise ValueError(f"{path} holds no images")
