"""What every layout of latents on disk offers to :class:`dcdit.data.LatentDataset`."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcdit.data.samples import DamagedFile

Array = np.ndarray[Any, Any]
Scale = float | Tensor


class LatentStore:
    """Latents and their labels, by item."""

    labels: Array
    """int64 (N,), at least 0."""
    shape: tuple[int, int, int]
    """(C, H, W) of a latent."""
    mirrored = False
    """Whether the latents of the mirrored images are stored too. (They are not the mirrored latents.)"""
    raw = False
    """Whether latents are stored in the autoencoder's own range."""
    class_names: tuple[str, ...] | None = None

    def range(self) -> tuple[Scale, Scale]:
        """(shift, scale), numbers or (C, 1, 1): a model sees (latent - shift) * scale."""
        return 0.0, 1.0

    def read(self, item: int, mirrored: bool, rng: np.random.Generator) -> Tensor:
        """The latent of an item, float32 ``shape``; of the mirrored image if asked. DamagedFile where there is none.

        ``rng`` feeds layouts that store a distribution.
        """
        raise NotImplementedError


def as_latent(array: Array, where: str, shape: tuple[int, ...] | None = None) -> Tensor:
    """A stored array as float32 (C, H, W), leading ones removed.

    Raises:
        DamagedFile: not that shape, not numbers, or not finite.
    """
    array = array.reshape(array.shape[-3:]) if array.size == np.prod(array.shape[-3:]) else array
    if array.ndim != 3 or array.dtype.kind != "f" or (shape is not None and array.shape != shape):
        accepted = "(C, H, W)" if shape is None else shape
        raise DamagedFile(f"{where} is {array.dtype} {array.shape}; accepted: float {accepted}")
    return checked(torch.from_numpy(array.astype(np.float32)), where)


def checked(latent: Tensor, where: str) -> Tensor:
    if not latent.isfinite().all():
        raise DamagedFile(f"{where} holds numbers that are not finite")
    return latent


def first_readable(read: Callable[[int], Tensor], count: int, skip_damaged: bool) -> Tensor:
    """The first item, or the first that can be read; it tells the shape of all."""
    for item in range(count):
        try:
            return read(item)
        except DamagedFile:
            if not skip_damaged or item == count - 1:
                raise
    raise ValueError("no latents")
