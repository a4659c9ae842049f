"""Latents in NumPy arrays: ``latents.npy`` and ``labels.npy`` in a folder, or an ``.npz`` of both."""

from pathlib import Path

import numpy as np
from torch import Tensor

from dcdit.data.latents.store import LatentStore, as_latent
from dcdit.data.npz import check_arrays, read_arrays


class ArrayStore(LatentStore):
    """The arrays of :class:`dcdit.data.NpzDataset`. A model sees latents as they are stored.

    Args:
        path: the folder or the archive.

    Raises:
        ValueError: images instead of latents, and as in :class:`dcdit.data.NpzDataset`.
    """

    def __init__(self, path: Path) -> None:
        arrays = read_arrays(path)
        if "latents" not in arrays:
            raise ValueError(f"{path} holds images; accepted: latents and labels (images: data.kind=npz)")
        self.labels = check_arrays(path, arrays)
        self.path, self.latents = path, arrays["latents"]
        self.shape = self.latents.shape[1:]

    def read(self, item: int, mirrored: bool, rng: np.random.Generator) -> Tensor:
        return as_latent(self.latents[item], f"{self.path}, latent {item}", self.shape)


def holds_arrays(path: Path) -> bool:
    """Whether a path looks like this file format."""
    return path.suffix == ".npz" or (path / "latents.npy").is_file()
