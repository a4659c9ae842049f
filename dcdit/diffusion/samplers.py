"""Samplers as generators of steps: from noise to data, one model call (Heun: two) per step.

The coefficients are float64 numbers on the host, so no step waits for the device. ``predict(x, t)`` is the model with
its labels and options fixed; t is the time as the model sees it, from 1000 (noise) down to 0 (data).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from dcdit.diffusion.schedule import TRAIN_STEPS, linear_schedule

Predict = Callable[[Tensor, float], Tensor]
Noise = Callable[[], Tensor]


class Step(NamedTuple):
    """One step of a sampler."""

    number: int
    """Counts from 0."""
    t: float
    """The time that the model saw."""
    x: Tensor
    """The state after the step, (B, C, H, W)."""
    x0: Tensor
    """The clean data that the model expected at this step, (B, C, H, W)."""


def ddpm(predict: Predict, x: Tensor, timesteps: Sequence[int], noise: Noise, clip: bool = False) -> Iterator[Step]:
    """Ancestral sampling (arXiv 2006.11239, algorithm 2) over these steps of the training schedule.

    The variance comes from the model if it returns 2C channels (arXiv 2102.09672, equation 15); otherwise it is beta.

    Args:
        x: (B, C, H, W) standard normal.
        timesteps: ascending, as :func:`dcdit.diffusion.space_timesteps` gives them.
        noise: draws a standard normal of x's shape for every step but the last.
        clip: clamp the expected clean data to [-1, 1] (pixels, not latents).
    """
    schedule = linear_schedule(timesteps)
    for number, i in enumerate(reversed(range(len(timesteps)))):
        t = timesteps[i]
        out = predict(x, t)
        x0 = _clean_data(x, out, schedule.alpha_bar[i].item(), clip)
        mean = schedule.posterior_x0[i].item() * x0 + schedule.posterior_xt[i].item() * x
        if i == 0:
            x = mean
        else:
            low, high = schedule.min_log_variance[i].item(), schedule.max_log_variance[i].item()
            variance = out[:, x.shape[1] :]
            log_variance = low + (variance + 1) / 2 * (high - low) if variance.shape[1] else None
            std = math.exp(0.5 * high) if log_variance is None else (0.5 * log_variance).exp()
            x = mean + std * noise()
        yield Step(number, t, x, x0)


def ddim(
    predict: Predict, x: Tensor, timesteps: Sequence[int], noise: Noise, eta: float = 0.0, clip: bool = False
) -> Iterator[Step]:
    """DDIM (arXiv 2010.02502, equation 12) over these steps of the training schedule; a learned variance is ignored.

    Args:
        eta: 0 is deterministic; 1 adds as much noise as DDPM.
        x, timesteps, noise, clip: as in :func:`ddpm`; noise is drawn only if eta is not 0.
    """
    schedule = linear_schedule(timesteps)
    for number, i in enumerate(reversed(range(len(timesteps)))):
        t, alpha_bar, previous = timesteps[i], schedule.alpha_bar[i].item(), schedule.alpha_bar_prev[i].item()
        x0 = _clean_data(x, predict(x, t), alpha_bar, clip)
        # Computed back from x0, because clipping may have changed it.
        eps = (x - math.sqrt(alpha_bar) * x0) / math.sqrt(1 - alpha_bar)
        sigma = eta * math.sqrt((1 - previous) / (1 - alpha_bar) * (1 - alpha_bar / previous))
        x = math.sqrt(previous) * x0 + math.sqrt(1 - previous - sigma**2) * eps
        if sigma > 0:
            x = x + sigma * noise()
        yield Step(number, t, x, x0)


def euler(predict: Predict, x: Tensor, num_steps: int) -> Iterator[Step]:
    """Euler steps of ``dx/dt = v`` from t = 1 to 0, for :class:`dcdit.diffusion.FlowMatchingObjective`. First order."""
    for number in range(num_steps):
        t, after = 1 - number / num_steps, 1 - (number + 1) / num_steps
        velocity = _velocity(predict, x, t)
        x0 = x - t * velocity
        x = x + (after - t) * velocity
        yield Step(number, t * TRAIN_STEPS, x, x0)


def heun(predict: Predict, x: Tensor, num_steps: int) -> Iterator[Step]:
    """Heun's method on the equation of :func:`euler`. Second order, with two model calls per step."""
    for number in range(num_steps):
        t, after = 1 - number / num_steps, 1 - (number + 1) / num_steps
        velocity = _velocity(predict, x, t)
        x0 = x - t * velocity
        velocity_after = _velocity(predict, x + (after - t) * velocity, after)
        x = x + (after - t) * (velocity + velocity_after) / 2
        yield Step(number, t * TRAIN_STEPS, x, x0)


def _velocity(predict: Predict, x: Tensor, t: float) -> Tensor:
    return predict(x, t * TRAIN_STEPS)[:, : x.shape[1]]


def _clean_data(x: Tensor, out: Tensor, alpha_bar: float, clip: bool) -> Tensor:
    x0 = (x - math.sqrt(1 - alpha_bar) * out[:, : x.shape[1]]) / math.sqrt(alpha_bar)
    return x0.clamp(-1, 1) if clip else x0
