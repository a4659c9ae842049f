"""What every file format of latents offers to :class:`dcdit.data.LatentDataset`."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcdit.data.samples import DamagedFile

Array = np.ndarray[Any, Any]
PerChannel = float | Tensor
"""One number for all channels, or (C, 1, 1)."""


class LatentStore:
    """Latents and their labels, by item."""

    labels: Array
    """int64 (N,), at least 0."""
    shape: tuple[int, int, int]
    """(C, H, W) of a latent."""
    has_mirrored = False
    """Whether the latents of the mirrored images are stored too. (They are not the mirrored latents.)"""
    unscaled = False
    """Whether latents are stored as the autoencoder gives them."""
    class_names: tuple[str, ...] | None = None

    def shift_and_scale(self) -> tuple[PerChannel, PerChannel]:
        """A model sees (latent - shift) * scale."""
        return 0.0, 1.0

    def read(self, item: int, mirrored: bool, rng: np.random.Generator) -> Tensor:
        """The latent of an item, float32 (C, H, W). DamagedFile if it cannot be read.

        Args:
            mirrored: read the latent of the mirrored image; only if ``has_mirrored``.
            rng: for formats that store a distribution, from which the latent is drawn.
        """
        raise NotImplementedError


def as_latent(array: Array, source: str, shape: tuple[int, ...] | None = None) -> Tensor:
    """A stored array as float32 (C, H, W), without leading dimensions of size 1.

    Args:
        source: the file, for error messages.
        shape: the (C, H, W) that is accepted; any by default.

    Raises:
        DamagedFile: not that shape, not numbers, or not finite.
    """
    array = array.reshape(array.shape[-3:]) if array.size == np.prod(array.shape[-3:]) else array
    if array.ndim != 3 or array.dtype.kind != "f" or (shape is not None and array.shape != shape):
        accepted = "(C, H, W)" if shape is None else shape
        raise DamagedFile(f"{source} is {array.dtype} {array.shape}; accepted: float {accepted}")
    return finite(torch.from_numpy(array.astype(np.float32)), source)


def finite(latent: Tensor, source: str) -> Tensor:
    """The latent itself. DamagedFile if it is not finite."""
    if not latent.isfinite().all():
        raise DamagedFile(f"{source} holds numbers that are not finite")
    return latent


def first_readable(read: Callable[[int], Tensor], count: int, skip_damaged: bool) -> Tensor:
    """The first item, or with ``skip_damaged`` the first that can be read. Its shape is that of all."""
    for item in range(count):
        try:
            return read(item)
        except DamagedFile:
            if not skip_damaged or item == count - 1:
                raise
    raise ValueError("no latents")
