"""Validation loss on held-out images: images, times and noise are the same every time, only the weights differ."""

from collections.abc import Callable, Mapping

import torch
from torch import Generator, Tensor

from dcdit.checkpoint import Model
from dcdit.config import TrainConfig
from dcdit.data import Samples, batches
from dcdit.diffusion import Objective
from dcdit.train.losses import autocast

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x (B, C, H, W), time (B,), y (B,)) -> the model's output."""


def validation_losses(
    model: Model,
    averaged: Mapping[str, Tensor],
    objective: Objective,
    held_out: Samples,
    config: TrainConfig,
    batch_size: int,
    device: torch.device,
) -> dict[str, float]:
    """``val_loss`` of the model's weights and ``val_loss_ema`` of averaged ones, without dropped tokens or labels."""
    model.eval()
    losses = {}
    for name, weights in (("val_loss", model.state_dict()), ("val_loss_ema", averaged)):

        def predict(x: Tensor, t: Tensor, y: Tensor, weights: Mapping[str, Tensor] = weights) -> Tensor:
            with autocast(config.optim, device):
                return torch.func.functional_call(model, dict(weights), (x, t, y)).float()

        losses[name] = validate(predict, objective, held_out, config.run.eval_images, batch_size, device)
    model.train()
    return losses


@torch.no_grad()
def validate(
    predict: Predict, objective: Objective, dataset: Samples, images: int, batch_size: int, device: torch.device
) -> float:
    """Mean diffusion loss over the first ``images`` samples, ``batch_size`` at a time.

    Time and noise of sample n follow from n alone, so the batch size does not matter.
    """
    size = min(batch_size, images)
    total = 0.0
    for number, (x, y) in enumerate(batches(dataset, 0, -(-images // size), size)):
        samples = range(number * size, min((number + 1) * size, images))
        x, y = x[: len(samples)].to(device), y[: len(samples)].to(device)
        draws = [objective.draw(x[:1].shape, device, Generator(device).manual_seed(n)) for n in samples]
        t, noise = (torch.cat(parts) for parts in zip(*draws, strict=True))
        noisy = objective.noise(x, t, noise)
        losses = objective.loss(predict(noisy.x, noisy.time, y), noisy)
        total += float(losses["loss"].double().sum())
    return total / images
