"""The router study on a router that follows detail, and on a model."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dcdit.diffusion import DiTObjective, FlowMatchingObjective
from dcdit.models import DCDiT, DCDiTConfig
from dcdit.profiling.router_study import local_detail, study_router


class Routed(NamedTuple):
    prob: Tensor
    natural_mask: Tensor


def images(count: int = 6) -> Tensor:
    """Noise on the right half only, more of it from image to image."""
    x = torch.zeros(count, 3, 16, 16)
    noise = torch.randn(count, 3, 16, 8, generator=torch.Generator().manual_seed(0))
    x[..., 8:] = noise * torch.linspace(0.1, 1.0, count)[:, None, None, None]
    return x


def by_detail(x: Tensor, t: Tensor, y: Tensor, return_routing: bool) -> tuple[None, Routed]:
    """Keeps what has detail."""
    prob = torch.sigmoid(local_detail(x).flatten(1) + 3)
    return None, Routed(prob, prob > 0.5)


def test_a_router_that_follows_detail() -> None:
    study = study_router(by_detail, images(), torch.zeros(6).long(), FlowMatchingObjective(), [0.0])
    assert study.detail_correlation[0] > 0.9
    assert study.kept_share_detailed[0] > study.kept_share_smooth[0]
    assert study.kept_share_smooth[0] <= study.kept_share[0] <= study.kept_share_detailed[0]
    assert (study.images, study.levels) == (6, [0.0])


def test_noise_hides_the_detail() -> None:
    study = study_router(by_detail, images(), torch.zeros(6).long(), FlowMatchingObjective(), [0.0, 0.5, 0.99])
    assert study.detail_correlation[0] > study.detail_correlation[1] > study.detail_correlation[2]


def test_a_router_is_compared_with_the_truth() -> None:
    x0, right = images(), torch.zeros(6, 16, 16, dtype=torch.bool)
    right[..., 8:] = True
    arguments = (x0, torch.zeros(6).long(), FlowMatchingObjective(), [0.0])
    study = study_router(by_detail, *arguments, detailed=right)
    prob = by_detail(x0, x0, x0, True)[1].prob.view(6, 16, 16)
    assert study.kept_share_inside == [float((prob[right] > 0.5).float().mean())]
    assert study.kept_share_outside == [float((prob[~right] > 0.5).float().mean())]
    assert study.kept_share_inside > study.kept_share_outside
    assert study_router(by_detail, *arguments).kept_share_inside == []


def test_detail_is_local_and_flat_where_nothing_happens() -> None:
    detail = local_detail(images())
    assert detail.shape == (6, 16, 16)
    assert float(detail[:, :, :4].max()) < float(detail[:, :, 12:].min())
    constant = local_detail(torch.full((1, 3, 8, 8), 7.0))
    torch.testing.assert_close(constant, torch.full((1, 8, 8), 1e-4).log())


def test_the_study_of_a_model_repeats() -> None:
    torch.manual_seed(0)
    model = DCDiT(
        DCDiTConfig(grid=(16, 16), in_channels=3, hidden_size=128, depth=1, num_heads=2, num_classes=4)
    ).eval()
    runs = [study_router(model, images(), torch.zeros(6).long(), DiTObjective(), [0.1, 0.6]) for _ in range(2)]
    assert runs[0] == runs[1]
    assert len(runs[0].kept_share) == 2


@pytest.mark.parametrize("count", [0, 2])
def test_too_few_images_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"x0 holds {count} images; accepted: at least 3"):
        x0, y = images(max(count, 1))[:count], torch.zeros(count).long()
        study_router(by_detail, x0, y, FlowMatchingObjective(), [0.0])


@pytest.mark.parametrize("level", [-0.1, 1.5])
def test_a_level_off_the_axis_is_refused(level: float) -> None:
    with pytest.raises(ValueError, match=f"levels holds {level}"):
        study_router(by_detail, images(), torch.zeros(6).long(), FlowMatchingObjective(), [level])
