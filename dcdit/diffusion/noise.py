"""Noise that depends on the index of an image, not on its batch."""

import hashlib

import torch
from torch import Tensor

_SEEDS = 1 << 63


class ImageNoise:
    """A source of standard normal batches (B, *shape) whose row i depends only on the seed and ``first_index + i``.

    So the images do not depend on the batch size. The numbers differ between kinds of device.

    Args:
        seed: any integer.
        first_index: index of the first image of this batch among all images drawn with the seed.
        count: B.
        shape: of one image.
    """

    def __init__(
        self, seed: int, first_index: int, count: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
    ) -> None:
        self._like = torch.empty((count, *shape), device=device, dtype=dtype)
        # Seeds count up from a hash of `seed`, so no two images of a run share one. That holds on the CPU too, whose
        # generator reads only the low 32 bits of a seed.
        start = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8], "big") + first_index
        self._generators = [torch.Generator(device).manual_seed((start + index) % _SEEDS) for index in range(count)]

    def __call__(self) -> Tensor:
        """The next batch, (B, *shape)."""
        batch = torch.empty_like(self._like)
        for image, generator in zip(batch, self._generators, strict=True):
            image.normal_(generator=generator)
        return batch
