"""Where in the spectrum a velocity is wrong: its squared error, split by spatial frequency."""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.studies import cifar10
from dcdit.checkpoint import Model
from dcdit.config import TrainConfig
from dcdit.diffusion import create_objective

EDGES = (0, 1, 3, 6, 10)
"""Cycles per image at which a band begins. The first band is the mean of the image alone."""
BANDS = ("0", "1 to 2", "3 to 5", "6 to 9", "10 and more")


def power_by_band(error: Tensor) -> list[float]:
    """(N, C, H, W) -> the mean square in each band of EDGES; they add up to that of the whole.

    The frequency of a mode is the larger one of those of its two directions.
    """
    power = torch.fft.fft2(error.double(), norm="forward").abs().square().mean((0, 1))
    rows, cols = (torch.fft.fftfreq(side, 1 / side).abs() for side in error.shape[2:])
    cycles = torch.maximum(rows[:, None], cols).flatten()
    bands = torch.bucketize(cycles, torch.tensor(EDGES[1:]), right=True)
    return torch.zeros(len(EDGES), dtype=torch.float64).index_add(0, bands, power.flatten().cpu()).tolist()


@torch.inference_mode()
def loss_by_band(config: TrainConfig, model: Model, count: int, levels: Sequence[float]) -> dict[str, list[float]]:
    """Noise level -> the loss of a model of the velocity in each band, on held-out images and the noise of all runs."""
    device, objective = next(model.parameters()).device, create_objective(config.diffusion.objective)
    x0, y = (tensor.to(device) for tensor in cifar10.held_out(config, count))
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0)
    found = {}
    for level in levels:
        errors = []
        for clean, labels, z in zip(*(tensor.split(cifar10.BATCH) for tensor in (x0, y, noise)), strict=True):
            noisy = objective.noise(clean, objective.t_at(level, clean), z)
            errors.append(model(noisy.x, noisy.time, labels) - noisy.target)
        found[str(level)] = power_by_band(torch.cat(errors))
    return found
