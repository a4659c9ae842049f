"""Inputs, and a router that keeps a chosen fraction of them, to time a model with random weights."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dcdit.models import DCDiT
from dcdit.nn.routers import PredictabilityRouter


def varied_latents(batch: int, channels: int, grid: tuple[int, int], seed: int = 0) -> Tensor:
    """(B, C, H, W) noise. Its smoothness differs between images, so that a router keeps more of some than of others."""
    generator = torch.Generator().manual_seed(seed)
    coarse_grid = (max(2, grid[0] // 8), max(2, grid[1] // 8))
    coarse = torch.randn(batch, channels, *coarse_grid, generator=generator)
    smooth = F.interpolate(coarse, grid, mode="bicubic", align_corners=False)
    rough = torch.randn(batch, channels, *grid, generator=generator)
    amount = torch.linspace(0.1, 1.0, batch)[:, None, None, None]
    return (1 - amount) * smooth + amount * rough


@torch.no_grad()
def calibrate_router(model: DCDiT, x: Tensor, t: Tensor, y: Tensor, kept_fraction: float) -> None:
    """Shift the output bias of an untrained router so that it naturally keeps this fraction of the positions of x.

    Args:
        model: its router is changed in place.
        x, t, y: a batch as the model takes it.
        kept_fraction: between 0 and 1.

    Raises:
        ValueError: another fraction, or a router other than the predictability router: no other has an output bias.
    """
    if not 0 < kept_fraction < 1:
        raise ValueError(f"kept_fraction is {kept_fraction}; accepted: a number between 0 and 1")
    if not isinstance(model.router, PredictabilityRouter):
        raise ValueError(f"router is {model.config.router!r}; calibration accepts: predictability")
    _, routing = model(x, t, y, return_routing=True)
    logits = torch.logit(routing.prob[:, 1:-1].float(), eps=1e-6)  # the ends are forced
    bias = model.router.out.bias
    bias.copy_(bias - torch.quantile(logits.flatten()[: 2**24], 1 - kept_fraction).to(bias.dtype))
