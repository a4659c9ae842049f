"""What a trained router looks at: kept tokens against local detail and against noise, as measured."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from dcdit.diffusion import Objective
from dcdit.models import DCDiT


@dataclass
class RouterStudy:
    """Means over the images studied. A list has one entry per noise level."""

    levels: list[float]
    """Noise levels: times from data (0) to noise (1)."""
    kept_share: list[float]
    """Fraction of the tokens that the router keeps without dropping."""
    detail_correlation: list[float]
    """Pearson correlation over all positions between the probability and the log of the local variance."""
    kept_share_smooth: list[float]
    """Kept fraction of the third of the images with the least detail."""
    kept_share_detailed: list[float]
    """Kept fraction of the third of the images with the most detail."""
    images: int
    kept_share_inside: list[float] = field(default_factory=list)
    """Kept fraction of the positions that are known to hold detail. Empty where nothing is known."""
    kept_share_outside: list[float] = field(default_factory=list)
    """Kept fraction of all other positions."""


@torch.inference_mode()
def study_router(
    model: DCDiT,
    x0: Tensor,
    y: Tensor,
    objective: Objective,
    levels: Sequence[float],
    seed: int = 0,
    detailed: Tensor | None = None,
) -> RouterStudy:
    """Route clean images at several noise levels.

    Args:
        model: in evaluation mode.
        x0: (B, C, H, W) clean images, B at least 3.
        y: (B,) labels.
        objective: that the model was trained for; it puts the noise on the images.
        levels: noise levels from 0 (data) to 1 (noise).
        seed: of the noise, which is the same at every level.
        detailed: (B, H, W) bool, the positions that are known to hold detail: the router is compared with them.

    Raises:
        ValueError: fewer than three images, or a level outside 0 to 1.
    """
    if len(x0) < 3:
        raise ValueError(f"x0 holds {len(x0)} images; accepted: at least 3, to compare smooth and detailed ones")
    wrong = [level for level in levels if not 0 <= level <= 1]
    if wrong:
        raise ValueError(f"levels holds {wrong[0]}; accepted: numbers from 0 (data) to 1 (noise)")
    detail = local_detail(x0)
    order = detail.flatten(1).mean(1).argsort()
    third = len(order) // 3
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed), device="cpu").to(x0)
    study = RouterStudy(list(levels), [], [], [], [], len(x0))
    for level in levels:
        noisy = objective.noise(x0, objective.t_at(level, x0), noise)
        _, routing = model(noisy.x, noisy.time, y, return_routing=True)
        kept = routing.natural_mask.float().mean(1)
        study.kept_share.append(float(kept.mean()))
        study.kept_share_smooth.append(float(kept[order[:third]].mean()))
        study.kept_share_detailed.append(float(kept[order[-third:]].mean()))
        if detailed is not None:
            inside = detailed.flatten(1).to(kept.device)
            study.kept_share_inside.append(float(routing.natural_mask[inside].float().mean()))
            study.kept_share_outside.append(float(routing.natural_mask[~inside].float().mean()))
        study.detail_correlation.append(_correlation(routing.prob, detail.flatten(1)))
    return study


def local_detail(x0: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W): log of the variance in a 5 x 5 window, mean over the channels."""
    window = {"kernel_size": 5, "stride": 1, "padding": 2, "count_include_pad": False}
    mean = F.avg_pool2d(x0, **window)  # type: ignore[arg-type]
    variance = F.avg_pool2d(x0.square(), **window) - mean.square()  # type: ignore[arg-type]
    return variance.clamp(min=0).mean(1).add(1e-4).log()


def _correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1])
