"""The nearest kept position is exact, ties included."""

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.inputs import generator
from torch import Tensor

from dcdit.ops._torch.nearest import nearest_kept

pytestmark = pytest.mark.usefixtures("host_reads")


def brute_force(kept: Tensor) -> Tensor:
    images, height, width = kept.shape
    rows, cols = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    distance = (rows[:, None] - rows) ** 2 + (cols[:, None] - cols) ** 2
    distance = distance.expand(images, -1, -1).masked_fill(~kept.view(images, 1, -1), height**2 + width**2)
    # argmin returns the first of equals, which has the lowest raster index.
    nearest = torch.where(kept.flatten(1).any(1)[:, None], distance.argmin(-1), -1)
    return nearest.view(kept.shape)


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    images=st.integers(1, 3),
    height=st.integers(1, 17),
    width=st.integers(1, 17),
    keep=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
@example(images=1, height=1, width=17, keep=0.1, seed=0)
@example(images=1, height=17, width=1, keep=0.1, seed=0)
def test_brute_force(host_reads: None, images: int, height: int, width: int, keep: float, seed: int) -> None:
    kept = torch.rand(images, height, width, generator=generator(seed)) < keep
    assert torch.equal(nearest_kept(kept), brute_force(kept))


@pytest.mark.parametrize("corner", [0, 31, 31 * 32, 32 * 32 - 1])
def test_one_far_corner(corner: int) -> None:
    kept = torch.zeros(1, 1024, dtype=torch.bool).index_fill(1, torch.tensor([corner]), True).view(1, 32, 32)
    assert (nearest_kept(kept) == corner).all()


def test_checkerboard_ties() -> None:
    kept = ((torch.arange(12)[:, None] + torch.arange(12)) % 2 == 0)[None]
    assert torch.equal(nearest_kept(kept), brute_force(kept))


def test_no_images() -> None:
    assert nearest_kept(torch.zeros(0, 3, 4, dtype=torch.bool)).shape == (0, 3, 4)
