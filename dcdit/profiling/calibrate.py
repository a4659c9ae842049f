"""Inputs, and a router or gates that leave a chosen share of the work, to time a model with random weights."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcdit.models import DCDiT, DyDiT
from dcdit.nn.embedding import of_first_block
from dcdit.nn.routers import CosineProjections, UniformRouter

BISECTIONS = 12


def varied_latents(batch: int, channels: int, grid: tuple[int, int]) -> Tensor:
    """(B, C, H, W) noise. Its smoothness differs between images, so that a router keeps more of some than of others."""
    generator = torch.Generator().manual_seed(0)
    coarse_grid = (max(2, grid[0] // 8), max(2, grid[1] // 8))
    coarse = torch.randn(batch, channels, *coarse_grid, generator=generator, device="cpu")
    smooth = F.interpolate(coarse, grid, mode="bicubic", align_corners=False)
    rough = torch.randn(batch, channels, *grid, generator=generator, device="cpu")
    amount = torch.linspace(0.1, 1.0, batch, device="cpu")[:, None, None, None]
    return (1 - amount) * smooth + amount * rough


@torch.no_grad()
def calibrate_router(model: DCDiT, x: Tensor, t: Tensor, y: Tensor, kept_fraction: float) -> None:
    """Change an untrained router so that it naturally keeps this fraction of the positions of x.

    The predictability router, dithered or not, gets another output bias. The key projection of a cosine router loses
    more or less of what all tokens have in common, which turns neighbours from alike to opposed.

    Args:
        model: its router is changed in place.
        x, t, y: a batch as the model takes it.
        kept_fraction: between 0 and 1.

    Raises:
        ValueError: another fraction, or one other than a quarter for the uniform router, which has no weights.
    """
    if not 0 < kept_fraction < 1:
        raise ValueError(f"kept_fraction is {kept_fraction}; accepted: a number between 0 and 1")
    router: Any = model.router
    if isinstance(router, UniformRouter):
        if kept_fraction != UniformRouter.SHARE:
            raise ValueError(
                f"kept_fraction is {kept_fraction}; accepted with the uniform router: {UniformRouter.SHARE}, which it "
                "always keeps"
            )
        return
    if isinstance(router, CosineProjections):
        _calibrate_cosine(model, x, t, y, kept_fraction)
        return
    _, routing = model(x, t, y, return_routing=True)
    logits = torch.logit(routing.prob[:, 1:-1].double(), eps=1e-9)  # the ends are forced
    bias, middle = router.out.bias, torch.quantile(logits.flatten()[: 2**24], 1 - kept_fraction)
    bias.copy_(bias - (middle / router.SHARPNESS).to(bias.dtype))


def _calibrate_cosine(model: DCDiT, x: Tensor, t: Tensor, y: Tensor, kept_fraction: float) -> None:
    """Keys become ``(I - a m m^T) x`` with the mean direction m of the tokens. More of a means that more are kept."""
    router: Any = model.router
    seen: list[Tensor] = []
    hook = router.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    model(x, t, y)
    hook.remove()
    mean = F.normalize(seen[0].float().mean((0, 1)), dim=0)
    identity = torch.eye(len(mean), device=mean.device)
    low, high = 0.0, 4.0
    for _ in range(BISECTIONS):
        amount = (low + high) / 2
        router.key.weight.copy_(identity - amount * torch.outer(mean, mean))
        kept = (router(seen[0]) > 0.5).float().mean()
        low, high = (amount, high) if kept < kept_fraction else (low, amount)


@torch.no_grad()
def calibrate_gates(model: DyDiT | DCDiT, x: Tensor, y: Tensor, share: float, times: Sequence[float]) -> None:
    """Change the gates of an untrained model of dynamic width so that this share is open, by random weights.

    Each gate of a head or of a group opens at that share of the timesteps, and the MLPs of a DyDiT take that share of
    the tokens of x at the middle one.

    Args:
        model: its gates are changed in place.
        x, y: images and labels of a batch as the model takes it.
        share: between 0 and 1.
        times: timesteps, many: those of a sampler, for example.
    """
    heads, device = model.config.num_heads, x.device
    gates: Any = model.width_gates
    routers = gates.linear
    nn.init.normal_(routers.weight)
    time = of_first_block(model.t_embedder(torch.tensor(times, device=device)))
    logits = (time @ routers.weight.T).float()
    # The first head and the first group are always open.
    routers.bias.copy_(-logits.quantile(1 - max(0.0, share * heads - 1) / (heads - 1), dim=0))
    for gate in getattr(model, "token_gates", ()):
        nn.init.normal_(gate.fc2.weight)
        nn.init.zeros_(gate.fc2.bias)
        seen: list[Tensor] = []
        hook = gate.register_forward_hook(lambda _module, _inputs, p, seen=seen: seen.append(p))
        model(x, torch.full(y.shape, times[len(times) // 2], device=device), y)
        hook.remove()
        gate.fc2.bias.fill_(-float(seen[0].logit(eps=1e-7).quantile(1 - share)))
