"""Validation loss on held-out images: images, timesteps and noise are the same every time, only the weights differ."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from dcdit.data import Samples, batches
from dcdit.diffusion import Objective

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]


@torch.no_grad()
def validate(
    predict: Predict, objective: Objective, dataset: Samples, images: int, batch_size: int, device: torch.device
) -> float:
    """Mean diffusion loss over the first ``images`` samples, ``batch_size`` at a time.

    Timestep and noise of sample n follow from n alone, whatever the batch size.
    """
    size = min(batch_size, images)
    total = 0.0
    for number, (x, y) in enumerate(batches(dataset, 0, -(-images // size), size)):
        numbers = range(number * size, min((number + 1) * size, images))
        x, y = x[: len(numbers)].to(device), y[: len(numbers)].to(device)
        draws = [objective.draw(x[:1].shape, device, Generator(device).manual_seed(n)) for n in numbers]
        t, noise = (torch.cat(parts) for parts in zip(*draws, strict=True))
        total += float(objective.losses(predict, x, y, t, noise)["loss"].double().sum())
    return total / images
