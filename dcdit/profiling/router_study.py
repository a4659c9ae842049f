"""What a trained router looks at: kept tokens against local detail and against noise, measured and not assumed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dcdit.models import DCDiT

Noising = Callable[[Tensor, float, Tensor], tuple[Tensor, Tensor]]
"""(x0, level, noise) -> (x at that noise level, t as the model takes it (B,)); see :func:`noising_of`."""


@dataclass
class RouterStudy:
    """Means over the images studied; one entry per noise level where a list."""

    levels: list[float]
    """Share of the way from data (0) to noise (1) in time."""
    kept_share: list[float]
    """Share of the tokens that the router keeps without dropping."""
    detail_correlation: list[float]
    """Pearson correlation over all positions between the probability and the log of the local variance."""
    kept_share_smooth: list[float]
    """Kept share of the third of the images with the least detail."""
    kept_share_detailed: list[float]
    """Kept share of the third with the most detail."""
    images: int


@torch.inference_mode()
def study_router(
    model: DCDiT, x0: Tensor, y: Tensor, noising: Noising, levels: Sequence[float], seed: int = 0
) -> RouterStudy:
    """Route clean images at several noise levels.

    Args:
        model: in evaluation mode.
        x0: (B, C, H, W) clean images, B at least 3.
        y: (B,) labels.
        noising: how the model's objective noises them.
        levels: shares of the time axis, 0 (data) to 1 (noise).
        seed: of the noise, the same at every level.

    Raises:
        ValueError: fewer than three images, or a level outside 0 to 1.
    """
    if len(x0) < 3:
        raise ValueError(f"x0 holds {len(x0)} images; accepted: at least 3, to compare smooth and detailed ones")
    wrong = [level for level in levels if not 0 <= level <= 1]
    if wrong:
        raise ValueError(f"levels holds {wrong[0]}; accepted: shares from 0 (data) to 1 (noise)")
    detail = local_detail(x0)
    order = detail.flatten(1).mean(1).argsort()
    third = len(order) // 3
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed)).to(x0)
    study = RouterStudy(list(levels), [], [], [], [], len(x0))
    for level in levels:
        x, t = noising(x0, level, noise)
        _, routing = model(x, t, y, return_routing=True)
        kept = routing.natural_mask.float().mean(1)
        study.kept_share.append(float(kept.mean()))
        study.kept_share_smooth.append(float(kept[order[:third]].mean()))
        study.kept_share_detailed.append(float(kept[order[-third:]].mean()))
        study.detail_correlation.append(_correlation(routing.prob, detail.flatten(1)))
    return study


def local_detail(x0: Tensor, side: int = 5) -> Tensor:
    """(B, C, H, W) -> (B, H, W): log of the variance in a ``side`` x ``side`` window, mean over the channels."""
    window = {"kernel_size": side, "stride": 1, "padding": side // 2, "count_include_pad": False}
    mean = F.avg_pool2d(x0, **window)  # type: ignore[arg-type]
    variance = F.avg_pool2d(x0.square(), **window) - mean.square()  # type: ignore[arg-type]
    return variance.clamp(min=0).mean(1).add(1e-4).log()


def noising_of(objective: str) -> Noising:
    """How ``"dit"`` or ``"flow"`` (see :mod:`dcdit.diffusion`) noises at a share of its time axis."""
    if objective == "flow":
        return _flow
    if objective == "dit":
        return _dit
    raise ValueError(f"unknown objective {objective!r}; accepted: dit, flow")


def _flow(x0: Tensor, level: float, noise: Tensor) -> tuple[Tensor, Tensor]:
    return (1 - level) * x0 + level * noise, torch.full(x0.shape[:1], 1000 * level, device=x0.device)


def _dit(x0: Tensor, level: float, noise: Tensor) -> tuple[Tensor, Tensor]:
    from dcdit.diffusion.schedule import linear_schedule

    t = min(int(1000 * level), 999)
    alpha_bar = float(linear_schedule().alpha_bar[t])
    return alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * noise, torch.full(x0.shape[:1], t, device=x0.device)


def _correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1])
