"""Validation loss on held-out images: images, times and noise are the same every time, only the weights differ."""

import contextlib
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from dcdit.checkpoint import Model
from dcdit.config import TrainConfig
from dcdit.data import Samples, batches, create_dataset
from dcdit.diffusion import Objective
from dcdit.train.ema import EMA
from dcdit.train.losses import autocast
from dcdit.utils.modules import evaluating

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x (B, C, H, W), time (B,), y (B,)) -> the model's output."""


class Validation:
    """The validations of a run. Without held-out images there are none.

    Args:
        model: its weights are validated.
        ema: of the model; its averages are validated too.
        batch_size: images per forward pass.
        interrupted: whether to give up; it is asked before every forward pass.
    """

    def __init__(
        self,
        model: Model,
        ema: EMA,
        objective: Objective,
        config: TrainConfig,
        batch_size: int,
        device: torch.device,
        interrupted: Callable[[], bool],
    ) -> None:
        self.model, self.ema, self.objective, self.config = model, ema, objective, config
        self.batch_size, self.device, self.interrupted = batch_size, device, interrupted
        wanted = config.run.eval_every and (config.data.held_out or config.data.held_out_path)
        classes = config.model.num_classes
        self.held_out = create_dataset(config.data, "held_out", 0, classes) if wanted else None

    def due(self, step: int) -> bool:
        """Whether the weights of this step are validated."""
        return self.held_out is not None and step > 0 and step % self.config.run.eval_every == 0

    def losses(self) -> dict[str, float] | None:
        """``val_loss`` of the model's weights and ``val_loss_ema`` of their averages; None if it gave up.

        No token and no label is dropped.
        """
        with evaluating(self.model), contextlib.suppress(_Interrupted):
            loss = self._loss()
            with self.ema.as_weights():
                return {"val_loss": loss, "val_loss_ema": self._loss()}
        return None

    def _loss(self) -> float:
        assert self.held_out is not None
        images = self.config.run.eval_images
        return validate(self._predict, self.objective, self.held_out, images, self.batch_size, self.device)

    def _predict(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if self.interrupted():
            raise _Interrupted
        with autocast(self.config.optim, self.device):
            return self.model(x, t, y).float()


class _Interrupted(Exception):
    """Leaves a validation."""


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
