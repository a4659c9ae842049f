"""NumPy arrays of images, or of latents that some encoder made."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcdit.data.archives import UnreadableArchive, map_npy, open_npz
from dcdit.data.labels import as_labels
from dcdit.data.samples import DamagedFile, Samples, Split, sample_rng, to_sample
from dcdit.utils.text import one_line

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
        ValueError: unreadable, or arrays that are missing or of another shape or type, or a label that is out of range.
            When a sample is read: a latent that is not finite.

    Example:
        >>> import numpy as np
        >>> from dcdit.data import NpzDataset
        >>> np.savez("images.npz", images=np.full((2, 8, 8, 3), 255, np.uint8), labels=np.array([3, 3]))
        >>> x, label = NpzDataset("images.npz", held_out=0)[0]
        >>> x.shape, x.unique().tolist(), label
        (torch.Size([3, 8, 8]), [1.0], 3)
    """

    def __init__(
        self, path: str | Path, split: str = "train", held_out: float = 0.1, flip: bool = True, seed: int = 0
    ) -> None:
        self.path = Path(path)
        arrays = read_arrays(self.path)
        self.labels = check_arrays(self.path, arrays)
        self.holds_latents = "latents" in arrays
        self.values = arrays["latents" if self.holds_latents else "images"]
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
            latent = torch.from_numpy(value.astype(np.float32))
            if not latent.isfinite().all():
                raise DamagedFile(f"{self.path}, latent {item} holds numbers that are not finite")
            return latent, label
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
            arrays = {name: _map(path / f"{name}.npy") for name in names if name in ARRAYS}
        else:
            with open_npz(path) as archive:
                names = archive.names
                arrays = {name: archive.read(name) for name in names if name in ARRAYS}
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, UnreadableArchive) else one_line(error)
        raise ValueError(f"{path} is not readable as NumPy arrays: {reason}") from None
    if len(arrays) != 2 or "labels" not in arrays:
        raise ValueError(f"{path} holds {names}; accepted: labels (all 0 for one class), and either images or latents")
    return arrays


def _map(file: Path) -> Array:
    try:
        return map_npy(file)
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from None


def check_arrays(path: Path, arrays: dict[str, Array]) -> Array:
    """The labels in arrays of :func:`read_arrays`, int64 (N,). ValueError where shapes, types or labels do not fit."""
    name = "latents" if "latents" in arrays else "images"
    values, labels = arrays[name], arrays["labels"]
    if name == "latents" and (values.ndim != 4 or values.dtype.kind != "f"):
        raise ValueError(f"{path}: latents are {values.dtype} {values.shape}; accepted: float (N, C, H, W)")
    if name == "images" and (values.ndim != 4 or values.shape[3] != 3 or values.dtype != np.uint8):
        raise ValueError(f"{path}: images are {values.dtype} {values.shape}; accepted: uint8 (N, H, W, 3)")
    if not values.size:
        raise ValueError(f"{path} holds no images: {name} are {values.shape}")
    return as_labels(labels, len(values), str(path))
