"""Validation loss on held-out images: images, timesteps and noise are the same every time, only the weights differ."""

from collections.abc import Callable

import torch
from torch import Tensor

from dcdit.data import Samples, batches

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
Objective = Callable[[Predict, Tensor, Tensor], dict[str, Tensor]]


@torch.no_grad()
def validate(
    predict: Predict, objective: Objective, dataset: Samples, images: int, batch_size: int, device: torch.device
) -> float:
    """Mean diffusion loss over the first ``images`` samples, ``batch_size`` at a time.

    Reseeds PyTorch's global random numbers.
    """
    size = min(batch_size, images)
    total = 0.0
    for number, (x, y) in enumerate(batches(dataset, 0, -(-images // size), size)):
        torch.manual_seed(number)
        count = min(size, images - number * size)
        total += float(objective(predict, x[:count].to(device), y[:count].to(device))["loss"].double().sum())
    return total / images
