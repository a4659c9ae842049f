"""Counter-based noise. A word of 32 bits is held in an int64, whose products wrap around at 64 bits as they should."""

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def philox_normal(seed: Tensor, images: Tensor, step: Tensor, size: int) -> Tensor:
    block = torch.arange(-(-size // 4), device=images.device)
    image = images[:, None]
    words = philox4x32(block, step, image, image >> 32, seed, seed >> 32)
    a, b, c, d = (word.expand(images.shape[0], block.shape[0]) for word in words)
    # In float64, because a quarter turn off a rounded angle is not a quarter turn.
    u = (torch.stack([a, c], dim=-1).float() * 2.0**-32 + 2.0**-33).double()
    radius, angle = (-2 * u.log()).sqrt(), torch.stack([b, d], dim=-1).double() * (math.pi / 2**31)
    normals = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return normals.flatten(1)[:, :size].float()


def philox4x32(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of Philox4x32-10 for a counter of four words and a key of two, int64 that broadcast.

    Of an argument only the low 32 bits count.
    """
    c0, c1, c2, c3, k0, k1 = (word & _MASK for word in (c0, c1, c2, c3, k0, k1))
    for _ in range(10):
        left, right = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (right >> 32 & _MASK) ^ c1 ^ k0, right & _MASK
        c2, c3 = (left >> 32 & _MASK) ^ c3 ^ k1, left & _MASK
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    return c0, c1, c2, c3
