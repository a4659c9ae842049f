"""The linear noise schedule of DDPM, and the subsets of its steps that a sampler visits."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TRAIN_STEPS = 1000
"""Steps of the training schedule; models see times from 0 (clean) to this (noise)."""


class NoiseSchedule(NamedTuple):
    """The coefficients of a Gaussian diffusion at S ascending steps, each (S,) and float64.

    ``q(x_t | x_0) = N(sqrt(alpha_bar) x_0, 1 - alpha_bar)``, and the posterior ``q(x_prev | x_t, x_0)`` has mean
    ``posterior_x0 * x_0 + posterior_xt * x_t``, where *prev* is the step before it among these S, or clean data.

    Example:
        >>> from dcdit.diffusion import linear_schedule
        >>> schedule = linear_schedule()
        >>> data, noise = schedule.data_scale, schedule.noise_scale  # x_t = data * x_0 + noise * epsilon
        >>> ((data**2 + noise**2) - 1).abs().max().item() < 1e-12
        True
    """

    timesteps: Tensor
    """int64: which steps of the training schedule these are, and the times that the model sees."""
    alpha_bar: Tensor
    alpha_bar_prev: Tensor
    data_scale: Tensor
    """sqrt(alpha_bar)."""
    noise_scale: Tensor
    """sqrt(1 - alpha_bar), computed in float64, because 1 - alpha_bar cancels in float32."""
    posterior_x0: Tensor
    posterior_xt: Tensor
    min_log_variance: Tensor
    """Log of the posterior variance: the lower end of a learned variance. The first step has the value of the second,
    because its posterior variance is 0."""
    max_log_variance: Tensor
    """Log of beta: the upper end of a learned variance."""

    def to(self, device: torch.device, dtype: torch.dtype) -> "NoiseSchedule":
        timesteps, *coefficients = self
        return NoiseSchedule(timesteps.to(device), *(x.to(device, dtype) for x in coefficients))


def linear_schedule(timesteps: Sequence[int] | None = None) -> NoiseSchedule:
    """The schedule of DDPM and DiT: 1000 betas from 1e-4 to 0.02 (arXiv 2006.11239, section 4), on the CPU.

    Args:
        timesteps: keep only these steps, ascending. The betas are those of the shorter chain, so that alpha_bar is
            unchanged at every kept step (improved diffusion, arXiv 2102.09672, section 4).

    Raises:
        ValueError: steps that are not ascending or not in [0, 1000).

    Example:
        >>> from dcdit.diffusion import linear_schedule, space_timesteps
        >>> full, short = linear_schedule(), linear_schedule(space_timesteps(4))
        >>> len(full.alpha_bar), short.timesteps.tolist()
        (1000, [0, 333, 666, 999])
        >>> bool((short.alpha_bar == full.alpha_bar[short.timesteps.long()]).all())
        True
    """
    steps = list(range(TRAIN_STEPS)) if timesteps is None else list(timesteps)
    if not steps or steps != sorted(set(steps)) or steps[0] < 0 or steps[-1] >= TRAIN_STEPS:
        raise ValueError(f"timesteps are {steps[:8]}...; accepted: ascending steps from 0 to {TRAIN_STEPS - 1}")
    kept = torch.tensor(steps, device="cpu")
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, TRAIN_STEPS, dtype=torch.float64, device="cpu")).cumprod(0)[kept]
    alpha_bar_prev = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    alpha = alpha_bar / alpha_bar_prev
    beta = 1 - alpha
    variance = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)
    # A chain of one step has no second variance. It needs none, because its only step is sampled without noise.
    variance[0] = variance[1] if len(steps) > 1 else beta[0]
    return NoiseSchedule(
        timesteps=kept,
        alpha_bar=alpha_bar,
        alpha_bar_prev=alpha_bar_prev,
        data_scale=alpha_bar.sqrt(),
        noise_scale=(1 - alpha_bar).sqrt(),
        posterior_x0=beta * alpha_bar_prev.sqrt() / (1 - alpha_bar),
        posterior_xt=alpha.sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar),
        min_log_variance=variance.log(),
        max_log_variance=beta.log(),
    )


def space_timesteps(steps: int | str) -> list[int]:
    """The steps of the training schedule that a shorter sampler visits, ascending, with the spacing of DiT.

    Args:
        steps: a number N (``250`` or ``"250"``): evenly spaced from the first step to the last, rounded. ``"ddimN"``:
            an integer stride from 0, as in DDIM.

    Raises:
        ValueError: not such a number, outside 1 to 1000, or no integer stride gives that many steps.

    Example:
        >>> from dcdit.diffusion import space_timesteps
        >>> space_timesteps(5), space_timesteps("ddim5")
        ([0, 250, 500, 749, 999], [0, 200, 400, 600, 800])
    """
    text = str(steps)
    count = int(text.removeprefix("ddim")) if text.removeprefix("ddim").isdecimal() else 0
    if not 1 <= count <= TRAIN_STEPS:
        raise ValueError(f"num_steps is {steps!r}; accepted: 1 to {TRAIN_STEPS}, or 'ddimN' with such an N")
    if text.startswith("ddim"):
        for stride in range(1, TRAIN_STEPS + 1):
            if len(range(0, TRAIN_STEPS, stride)) == count:
                return list(range(0, TRAIN_STEPS, stride))
        raise ValueError(f"num_steps is {steps!r}, but no integer stride takes {count} of {TRAIN_STEPS} steps")
    # Added up, not multiplied: for some counts the two round to different steps, and published numbers use the sum.
    spaced, position = [], 0.0
    for _ in range(count):
        spaced.append(round(position))
        position += (TRAIN_STEPS - 1) / max(1, count - 1)
    return spaced
