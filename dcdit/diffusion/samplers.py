"""Samplers: from noise to data, one model call (Heun: two) per step.

A sampler is a table of numbers and an update. The numbers of a step (:attr:`Chain.coefficients`) are computed before
the first step, in float64; the update reads them as tensors on the device. So no step waits for the device, and all
steps of a run are the same work on other numbers, which a CUDA graph can repeat (:mod:`dcdit.diffusion.step`).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dcdit.diffusion.schedule import TRAIN_STEPS, linear_schedule

Noise = Callable[[], Tensor]
"""Draws a standard normal of x's shape."""
Predict = Callable[[Tensor, int], Tensor]
"""Model call number 0 or 1 of a step: x (B, C, H, W) -> (B, C or 2C, H, W)."""
Coefficients = Sequence[Tensor]
"""The numbers of one step, each ()."""
Update = Callable[[Predict, Tensor, Coefficients, Noise], tuple[Tensor, Tensor]]
"""(model, x, numbers, noise) -> x after the step, and the clean data that the model expects."""


class Step(NamedTuple):
    """One step of a sampler.

    Example:
        >>> import torch
        >>> from dcdit.diffusion import sample
        >>> seen = []
        >>> options = {"shape": (1, 2, 2), "progress": False, "callback": seen.append}
        >>> x = sample(lambda x, t, y: x * 0, torch.tensor([0]), 2, "euler", **options)
        >>> [(step.number, step.t) for step in seen], torch.equal(seen[-1].x, x)
        ([(0, 1000.0), (1, 500.0)], True)
    """

    number: int
    """Counts from 0."""
    t: float
    """The time that the model saw."""
    x: Tensor
    """The state after the step, (B, C, H, W)."""
    x0: Tensor
    """The clean data that the model expected at this step, (B, C, H, W)."""


class Chain(NamedTuple):
    """A run of a sampler, except for the model and the noise."""

    times: Sequence[tuple[float, ...]]
    """Of each step: the times of its model calls, as the model sees them, from 1000 (noise) down to 0 (data)."""
    coefficients: Sequence[tuple[float, ...]]
    """Of each step: the numbers that the update reads."""
    update: Update
    name: tuple[str, bool]
    """What tells two updates apart: the method, and a flag of it."""


def ddpm(timesteps: Sequence[int], clip: bool = False) -> Chain:
    """Ancestral sampling (arXiv 2006.11239, algorithm 2) over these steps of the training schedule.

    The variance comes from the model if it returns 2C channels (arXiv 2102.09672, equation 15); otherwise it is beta.

    Args:
        timesteps: ascending, as :func:`dcdit.diffusion.space_timesteps` gives them.
        clip: clamp the expected clean data to [-1, 1] (pixels, not latents).
    """
    schedule = linear_schedule(timesteps)
    rows = []
    for i in reversed(range(len(timesteps))):
        low, high = schedule.min_log_variance[i].item(), schedule.max_log_variance[i].item()
        posterior = schedule.posterior_x0[i].item(), schedule.posterior_xt[i].item()
        rows.append((*_scales(schedule.alpha_bar[i].item()), *posterior, low, high - low, math.exp(0.5 * high), i > 0))

    def update(predict: Predict, x: Tensor, c: Coefficients, noise: Noise) -> tuple[Tensor, Tensor]:
        data_scale, noise_scale, posterior_x0, posterior_xt, low, span, beta_std, noisy = c
        out = predict(x, 0)
        x0 = _clean_data(x, out, data_scale, noise_scale, clip)
        mean = posterior_x0 * x0 + posterior_xt * x
        variance = out[:, x.shape[1] :]
        std = (0.5 * (low + (variance + 1) / 2 * span)).exp() if variance.shape[1] else beta_std
        return mean + torch.where(noisy > 0, std * noise(), 0.0), x0

    return Chain([(t,) for t in reversed(timesteps)], rows, update, ("ddpm", clip))


def ddim(timesteps: Sequence[int], eta: float = 0.0, clip: bool = False) -> Chain:
    """DDIM (arXiv 2010.02502, equation 12) over these steps of the training schedule; a learned variance is ignored.

    Args:
        eta: 0 is deterministic; 1 adds as much noise as DDPM.
        timesteps, clip: as in :func:`ddpm`.
    """
    schedule = linear_schedule(timesteps)
    rows = []
    for i in reversed(range(len(timesteps))):
        alpha_bar, previous = schedule.alpha_bar[i].item(), schedule.alpha_bar_prev[i].item()
        sigma = eta * math.sqrt((1 - previous) / (1 - alpha_bar) * (1 - alpha_bar / previous))
        rows.append((*_scales(alpha_bar), math.sqrt(previous), math.sqrt(1 - previous - sigma**2), sigma))

    def update(predict: Predict, x: Tensor, c: Coefficients, noise: Noise) -> tuple[Tensor, Tensor]:
        data_scale, noise_scale, next_data_scale, next_noise_scale, sigma = c
        x0 = _clean_data(x, predict(x, 0), data_scale, noise_scale, clip)
        # Computed back from x0, because clipping may have changed it.
        eps = (x - data_scale * x0) / noise_scale
        x = next_data_scale * x0 + next_noise_scale * eps
        return (x + sigma * noise() if eta > 0 else x), x0

    return Chain([(t,) for t in reversed(timesteps)], rows, update, (f"ddim, eta above 0: {eta > 0}", clip))


def euler(num_steps: int) -> Chain:
    """Euler steps of ``dx/dt = v`` from t = 1 to 0, for :class:`dcdit.diffusion.FlowMatchingObjective`. First order."""

    def update(predict: Predict, x: Tensor, c: Coefficients, noise: Noise) -> tuple[Tensor, Tensor]:
        t, width = c
        velocity = predict(x, 0)[:, : x.shape[1]]
        return x + width * velocity, x - t * velocity

    times, rows = _even_steps(num_steps)
    return Chain([(t * TRAIN_STEPS,) for t, _ in times], rows, update, ("euler", False))


def heun(num_steps: int) -> Chain:
    """Heun's method on the equation of :func:`euler`. Second order, with two model calls per step."""

    def update(predict: Predict, x: Tensor, c: Coefficients, noise: Noise) -> tuple[Tensor, Tensor]:
        t, width = c
        velocity = predict(x, 0)[:, : x.shape[1]]
        velocity_after = predict(x + width * velocity, 1)[:, : x.shape[1]]
        return x + width * (velocity + velocity_after) / 2, x - t * velocity

    times, rows = _even_steps(num_steps)
    return Chain([(t * TRAIN_STEPS, after * TRAIN_STEPS) for t, after in times], rows, update, ("heun", False))


def _even_steps(count: int) -> tuple[list[tuple[float, float]], list[tuple[float, ...]]]:
    """Of each step: the times (in [0, 1]) at its two ends; the first of them, and the way to the other."""
    times = [(1 - number / count, 1 - (number + 1) / count) for number in range(count)]
    return times, [(t, after - t) for t, after in times]


def _scales(alpha_bar: float) -> tuple[float, float]:
    return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)


def _clean_data(x: Tensor, out: Tensor, data_scale: Tensor, noise_scale: Tensor, clip: bool) -> Tensor:
    x0 = (x - noise_scale * out[:, : x.shape[1]]) / data_scale
    return x0.clamp(-1, 1) if clip else x0
