"""Noise that depends on a counter and on nothing else: not on the batch, the backend or what was drawn before."""

import torch
from torch import Tensor

from dcdit.ops import checks
from dcdit.ops.backend import backend_for

__all__ = ["philox_normal"]


def philox_normal(seed: Tensor, images: Tensor, step: Tensor, size: int) -> Tensor:
    """Standard normal noise in which an element depends only on the seed, its image, the step and its place.

    Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011) with the seed as its key and
    (place // 4, step, image index) as its counter, then the transform of Box and Muller. The random bits are the same
    on every backend and device; the normals differ by a few ulp. Everything is read on the device, so a CUDA graph
    draws new noise in every replay if the step is counted there. Not differentiable.

    Args:
        seed: () int64.
        images: (B,) int64, the index of each image.
        step: () int64, counts what is drawn for the same images; taken modulo 2^32.
        size: elements of an image, at most 2^33.

    Returns:
        (B, size) float32.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.

    Example:
        >>> seed, step = torch.tensor(7), torch.tensor(0)
        >>> both = ops.philox_normal(seed, torch.tensor([0, 1]), step, 5)
        >>> torch.equal(ops.philox_normal(seed, torch.tensor([1]), step, 5), both[1:])
        True
        >>> [round(number, 3) for number in both[0, :3].tolist()]
        [0.0, -0.305, 1.789]
    """
    for name, tensor in (("seed", seed), ("images", images), ("step", step)):
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name} has dtype {tensor.dtype}; accepted: int64")
    checks.check_shape("seed", seed, (), "one number")
    checks.check_shape("step", step, (), "one number")
    checks.check_shape("images", images, (images.numel(),), "(B,)")
    checks.check_device(images=images, seed=seed, step=step)
    checks.check_count("size", size)
    if not 0 <= size <= 1 << 33:
        raise ValueError(f"size is {size}; accepted: 0 to 2^33 elements of an image")
    return backend_for(images).philox_normal(seed, images.contiguous(), step, size)
