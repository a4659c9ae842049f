"""NumPy arrays of images, or of latents that some encoder made."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcdit.data.latents.store import LatentStore, as_latent
from dcdit.data.samples import Samples, Split, sample_rng, to_sample

Array = np.ndarray[Any, Any]
ARRAYS = ("images", "latents", "labels")


class NpzDataset(Samples):
    """An ``.npz`` with ``labels`` (N,) integer, and ``images`` (N, H, W, 3) uint8 or ``latents`` (N, C, H, W) float.

    An archive is held in memory; a folder of ``labels.npy`` and ``images.npy`` or ``latents.npy`` stays on disk and is
    mapped. Latents come as they are stored, in float32; only images are mirrored.

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
        arrays = _load(Path(path))
        self.latent = "latents" in arrays
        self.values = arrays["latents"] if self.latent else arrays["images"]
        self.labels = arrays["labels"]
        _check(path, self.values, self.labels, self.latent)
        n, *rest = self.values.shape
        self.shape = tuple(rest) if self.latent else (rest[2], rest[0], rest[1])
        self.class_names = tuple(str(label) for label in range(int(self.labels.max()) + 1))
        self.split = Split(split, n, held_out, seed, path)
        self.flip = flip and split == "train" and not self.latent
        self.seed = seed

    def __getitem__(self, n: int) -> tuple[Tensor, int]:
        item = self.split.item(n)
        value, label = self.values[item], int(self.labels[item])
        if self.latent:
            return torch.from_numpy(value.astype(np.float32)), label
        if self.flip and sample_rng(self.seed, n).integers(2):
            value = value[:, ::-1]
        return to_sample(value), label


class ArrayLatents(LatentStore):
    """The latents of :class:`NpzDataset` for :class:`dcdit.data.LatentDataset`. Errors as there."""

    def __init__(self, path: Path) -> None:
        arrays = _load(path)
        if "latents" not in arrays:
            raise ValueError(f"{path} holds images; accepted: latents and labels (images: data.kind=npz)")
        _check(path, arrays["latents"], arrays["labels"], latent=True)
        self.path, self.values = path, arrays["latents"]
        self.labels = np.asarray(arrays["labels"], np.int64)
        self.shape = self.values.shape[1:]

    def read(self, item: int, mirrored: bool, rng: np.random.Generator) -> Tensor:
        return as_latent(self.values[item], f"{self.path}, latent {item}", self.shape)


def has_latents(path: Path) -> bool:
    return path.suffix == ".npz" or (path / "latents.npy").is_file()


def _load(path: Path) -> dict[str, Array]:
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


def _check(path: str | Path, values: Array, labels: Array, latent: bool) -> None:
    if latent and (values.ndim != 4 or values.dtype.kind != "f"):
        raise ValueError(f"{path}: latents are {values.dtype} {values.shape}; accepted: float (N, C, H, W)")
    if not latent and (values.ndim != 4 or values.shape[3] != 3 or values.dtype != np.uint8):
        raise ValueError(f"{path}: images are {values.dtype} {values.shape}; accepted: uint8 (N, H, W, 3)")
    if labels.shape != values.shape[:1] or labels.dtype.kind not in "iu" or (labels.size and labels.min() < 0):
        raise ValueError(
            f"{path}: labels are {labels.dtype} {labels.shape}; accepted: {values.shape[0]} integers of at least 0"
        )
    if not labels.size:
        raise ValueError(f"{path} holds no images")
