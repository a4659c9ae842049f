"""Counter-based noise on the PyTorch backend: published bits, moments and tails, the words that make the key."""

import math

import pytest
import torch
from support.random123 import PUBLISHED

from dcdit import ops
from dcdit.ops._torch.noise import philox4x32


def normals(images: int, size: int, seed: int = 0, step: int = 0) -> torch.Tensor:
    return ops.philox_normal(torch.tensor(seed), torch.arange(images), torch.tensor(step), size)


@pytest.mark.parametrize(("counter", "key", "expected"), PUBLISHED)
def test_published_bits_of_the_generator(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    words = philox4x32(*map(torch.tensor, counter), *map(torch.tensor, key))
    assert tuple(int(word) for word in words) == expected


def test_moments_and_tails_are_those_of_a_normal() -> None:
    """Bounds are 5 standard errors of each estimate for this count."""
    z = normals(64, 20_000, seed=3).double().flatten()
    count = z.numel()
    for power, (expected, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96), 6: (15, 10170)}.items():
        assert abs(float((z**power).mean()) - expected) < 5 * math.sqrt(variance / count), power
    for bound in (0.5, 1.0, 2.0, 3.0, 4.0):
        probability = math.erfc(bound / math.sqrt(2)) / 2
        for tail in (z > bound, z < -bound):
            error = math.sqrt(probability * (1 - probability) / count)
            assert abs(float(tail.double().mean()) - probability) < 5 * error, bound
    assert z.isfinite().all()
    assert float(z.abs().max()) > 4.7


@pytest.mark.parametrize("shift", [1, 2, 3, 4, 1000])
def test_neighbours_are_uncorrelated(shift: int) -> None:
    z = normals(64, 5_000).double()
    along = (z[:, shift:] * z[:, :-shift]).flatten()
    assert abs(float(along.mean())) < 5 / math.sqrt(along.numel())
    for other in (normals(64, 5_000, seed=shift), normals(64, 5_000, step=shift), z.roll(shift, 0)):
        product = (z * other).flatten()
        assert abs(float(product.mean())) < 5 / math.sqrt(product.numel())


def test_extreme_words() -> None:
    """The smallest and the largest first word of a pair, through the same arithmetic as in the operation."""
    words = torch.tensor([0, 0xFFFFFFFF])
    u = words.float() * 2.0**-32 + 2.0**-33
    assert u.tolist() == [2.0**-33, 1.0]
    assert float((-2 * u.log()).sqrt().max()) < 6.8


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": torch.tensor(1.0)}, r"seed has dtype torch.float32; accepted: int64"),
        ({"images": torch.zeros(2, 2, dtype=torch.int64)}, r"images has shape \(2, 2\)"),
        ({"step": torch.zeros(1, dtype=torch.int64)}, r"step has shape \(1\)"),
        ({"size": 2.0}, r"size is 2.0; accepted: an int"),
        ({"size": -1}, r"size is -1; accepted: 0 to 2\^33"),
    ],
)
def test_bad_input_is_named(changed: dict[str, object], message: str) -> None:
    given = {"seed": torch.tensor(1), "images": torch.arange(2), "step": torch.tensor(0), "size": 3}
    with pytest.raises((TypeError, ValueError), match=message):
        ops.philox_normal(**{**given, **changed})
