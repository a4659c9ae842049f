"""Noise that depends on the index of an image and on the step, not on the batch or on what was drawn before."""

import math

import torch
from torch import Tensor

from dcdit.ops.noise import philox_normal


class ImageNoise:
    """Standard normal batches (B, *shape) whose row i depends only on the seed, ``first_index + i`` and the step.

    So an image does not depend on the batch size, the number of processes or the kind of device, up to a few ulp. Its
    numbers are those of :func:`dcdit.ops.philox_normal`.

    Args:
        seed: any integer; seeds that are equal modulo 2^64 are the same.
        first_index: index of the first image of this batch among all images drawn with the seed.
        count: B.
        shape: of one image.
    """

    def __init__(
        self, seed: int, first_index: int, count: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
    ) -> None:
        signed = (seed + 2**63) % 2**64 - 2**63
        self.seed = torch.tensor(signed, device=device)
        self.images = torch.arange(first_index, first_index + count, device=device)
        self._shape, self._dtype = shape, dtype

    def __call__(self, step: Tensor) -> Tensor:
        """(B, *shape) of a step, which is () int64 on the device: 0 is the noise that sampling starts from."""
        noise = philox_normal(self.seed, self.images, step, math.prod(self._shape))
        return noise.view(len(self.images), *self._shape).to(self._dtype)
