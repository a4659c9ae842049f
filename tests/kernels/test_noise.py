"""Counter-based noise: published bits of the generator, accuracy of the normals, what an element depends on."""

import pytest
import torch
import triton
import triton.language as tl
from support.random123 import PUBLISHED
from torch import Tensor

from dcdit import ops
from dcdit.kernels import launch
from dcdit.ops import reference


@triton.jit
def _words_kernel(
    seed_ptr,  # () int64
    counter_ptr,  # (4,) int32
    out_ptr,  # (4,) int32
):
    a, b, c, d = (
        tl.load(counter_ptr),
        tl.load(counter_ptr + 1),
        tl.load(counter_ptr + 2),
        tl.load(counter_ptr + 3),
    )
    a, b, c, d = tl.philox(tl.load(seed_ptr), a, b, c, d)
    tl.store(out_ptr, a.to(tl.int32, bitcast=True))
    tl.store(out_ptr + 1, b.to(tl.int32, bitcast=True))
    tl.store(out_ptr + 2, c.to(tl.int32, bitcast=True))
    tl.store(out_ptr + 3, d.to(tl.int32, bitcast=True))


def signed(value: int, bits: int) -> int:
    return value - (value >> bits - 1 << bits)


@pytest.mark.parametrize(("counter", "key", "expected"), PUBLISHED)
def test_published_bits_of_the_generator(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...], device: torch.device
) -> None:
    seed = torch.tensor(signed(key[1] << 32 | key[0], 64), device=device)
    words = torch.tensor([signed(word, 32) for word in counter], dtype=torch.int32, device=device)
    out = launch.empty((4,), torch.int32, device)
    launch.launch(_words_kernel, (1,), seed, words, out)
    assert out.tolist() == [signed(word, 32) for word in expected]


def arguments(device: torch.device, seed: int = -(2**50) + 3, step: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    images = torch.tensor([0, 1, 2**31, 2**40 + 1, -1], device=device)
    return torch.tensor(seed, device=device), images, torch.tensor(step, device=device)


@pytest.mark.parametrize("size", [1, 4, 1023, 1024, 1500])
def test_normals_differ_from_the_definition_by_a_few_ulps(size: int, device: torch.device) -> None:
    """Of each value, not of the largest: small values are precise too."""
    args = arguments(device)
    with ops.use_backend("triton"):
        normals = ops.philox_normal(*args, size)
    expected = reference.philox_normal(*args, size)
    ulp = torch.finfo(torch.float32).eps * expected.abs()
    assert ((normals - expected).abs() <= 4 * ulp).all()


def test_an_element_depends_on_its_own_counter_only(device: torch.device) -> None:
    seed, images, step = arguments(device)
    with ops.use_backend("triton"):
        whole = ops.philox_normal(seed, images, step, 130)
        alone = ops.philox_normal(seed, images[3:4], step, 70)
        strided = ops.philox_normal(seed, images.repeat_interleave(2)[::2], step, 130)
        others = [
            ops.philox_normal(seed + 1, images, step, 130),
            ops.philox_normal(seed + 2**32, images, step, 130),
            ops.philox_normal(seed, images, step + 1, 130),
            ops.philox_normal(seed, images + 5, step, 130),
        ]
    assert torch.equal(alone, whole[3:4, :70])
    assert torch.equal(strided, whole)
    assert all(not (other == whole).any() for other in others)
