"""Normal noise from a counter: what an element gets depends only on the seed, its image, the step and its place.

Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011) turns a key of 64 bits and a counter
of 128 bits into four words of 32 bits. Here the key is the seed, and the counter is (element // 4, step, image). Two
words make two normals (Box and Muller): the first gives the radius, the second the angle.

Seed, image indices and step are read from device memory. So a CUDA graph that holds a launch draws new noise in every
replay.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcdit.kernels import launch
from dcdit.kernels.numerics import cdiv

launch.set_default_configs("philox_normal", {"BLOCK": 256, "num_warps": 4})

_RADIANS = tl.constexpr(math.pi / 2**31)


@triton.jit
def _box_muller(word, other):
    """Two words of 32 bits -> two standard normals, float32."""
    u = word.to(tl.float32) * (2.0**-32) + 2.0**-33  # in (0, 1]; 2^-33 bounds the normals by 6.8
    radius = tl.sqrt_rn(-2.0 * tl.log(u))
    # The angle is 2 pi other / 2^32. Its nearest quarter turn is taken off in integers, which rounds nothing. The
    # Taylor polynomials of the rest, at most pi / 4, are exact beyond float32.
    shifted = other + (1 << 29)
    quarter = (shifted >> 30) & 3
    rest = (shifted & 0x3FFFFFFF).to(tl.int32) - (1 << 29)
    x = rest.to(tl.float32) * _RADIANS
    s = x * x
    sine = x + x * s * (-1 / 6 + s * (1 / 120 + s * (-1 / 5040 + s * (1 / 362880))))
    cosine = 1.0 - s * (0.5 - s * (1 / 24 - s * (1 / 720 - s * (1 / 40320 - s * (1 / 3628800)))))
    across = (quarter & 1) == 1
    x, y = tl.where(across, sine, cosine), tl.where(across, cosine, sine)
    x = tl.where((quarter == 1) | (quarter == 2), -x, x)
    y = tl.where(quarter >= 2, -y, y)
    return radius * x, radius * y


@triton.jit(do_not_specialize=["size"])
def _philox_normal_kernel(
    seed_ptr,  # () int64
    images_ptr,  # (images,) int64
    step_ptr,  # () int64
    out_ptr,  # (images, size) float32
    size, BLOCK: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    image, step = tl.load(images_ptr + row), tl.load(step_ptr)
    counter = part * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    zeros = tl.zeros((BLOCK,), dtype=tl.int32)
    low, high = zeros + image.to(tl.int32), zeros + (image >> 32).to(tl.int32)
    a, b, c, d = tl.philox(tl.load(seed_ptr), counter, zeros + step.to(tl.int32), low, high)
    x, y = _box_muller(a, b)
    z, w = _box_muller(c, d)
    element = part.to(tl.int64) * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)  # [4 * BLOCK]
    normals = tl.interleave(tl.interleave(x, z), tl.interleave(y, w))
    tl.store(out_ptr + row * size + element, normals, mask=element < size)


def philox_normal_fwd(seed: Tensor, images: Tensor, step: Tensor, size: int) -> Tensor:
    """int64 seed (), image indices (B,) and step () -> standard normals (B, size), float32."""
    count = images.shape[0]
    out = launch.empty((count, size), torch.float32, images.device)
    config = launch.config_for("philox_normal", images.device)
    launch.launch(
        _philox_normal_kernel, (count, cdiv(size, 4 * config["BLOCK"])), seed, images, step, out, size, **config
    )
    return out
