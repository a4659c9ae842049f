"""Training objectives: ``objective(model_fn, x0, y) -> {"loss": (B,), ...}``."""

import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Generator, Tensor

from dcdit.diffusion.likelihood import discretized_gaussian_log_likelihood, gaussian_kl
from dcdit.diffusion.schedule import TRAIN_STEPS, NoiseSchedule, linear_schedule
from dcdit.utils.text import shape_of

ModelFn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x (B, C, H, W), t (B,), y (B,)) -> (B, C or 2C, H, W)."""


class DiTObjective:
    """Noise prediction with a learned variance, as DiT trains (arXiv 2212.09748; hybrid loss of arXiv 2102.09672).

    ``loss = mean (eps - eps_hat)^2 + vlb``. The vlb is the term of the variational bound at the drawn step, in bits per
    element: the KL to the true posterior, or at step 0 the discretised decoder. It trains the variance only: its
    gradient does not reach eps_hat. (The weight 0.001 of the paper times the 1000 steps that one term stands for is 1.)

    Args:
        learn_sigma: the model returns 2C channels, the second half interpolating the log variance. Without it, C
            channels and no vlb.
    """

    def __init__(self, learn_sigma: bool = True) -> None:
        self.learn_sigma = learn_sigma

    def __call__(
        self, model_fn: ModelFn, x0: Tensor, y: Tensor, generator: Generator | None = None
    ) -> dict[str, Tensor]:
        """Losses at random steps.

        Args:
            model_fn: receives x_t in x0's dtype, t int64 in [0, 1000), y.
            x0: (B, C, H, W) clean data.
            y: (B,) labels, handed on.
            generator: on x0's device; fixes t and the noise.

        Returns:
            ``loss``, ``mse``, ``vlb`` (with ``learn_sigma``) and ``t``, each (B,), computed in float32 at least.

        Raises:
            ValueError: x0 is not (B, C, H, W), or the model's output has the wrong shape.
        """
        return self.losses(model_fn, x0, y, *self.draw(x0.shape, x0.device, generator, x0.dtype))

    def draw(
        self,
        shape: Sequence[int],
        device: torch.device,
        generator: Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        """The random steps (B,) and noise (B, C, H, W), float32 at least, that ``losses`` takes for data of a shape."""
        t = torch.randint(TRAIN_STEPS, shape[:1], device=device, generator=generator)
        return t, torch.randn(shape, device=device, dtype=_wide(dtype), generator=generator)

    def losses(self, model_fn: ModelFn, x0: Tensor, y: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """The same at given steps ``t`` (B,) int64 and with given noise."""
        _check_data(x0)
        schedule = _schedule_on(x0.device, noise.dtype)
        clean = x0.to(noise.dtype)
        x_t = _column(schedule.data_scale, t) * clean + _column(schedule.noise_scale, t) * noise
        out = model_fn(x_t.to(x0.dtype), t, y).to(noise.dtype)
        channels = x0.shape[1] * (2 if self.learn_sigma else 1)
        _check_output(out, x0, (channels,))
        eps = out[:, : x0.shape[1]]
        mse = ((eps - noise) ** 2).flatten(1).mean(1)
        if not self.learn_sigma:
            return {"loss": mse, "mse": mse, "t": t}
        vlb = _vlb_bits(schedule, clean, x_t, t, noise - eps.detach(), out[:, x0.shape[1] :])
        return {"loss": mse + vlb, "mse": mse, "vlb": vlb, "t": t}


class FlowMatchingObjective:
    """Velocity prediction on straight paths (flow matching; SiT, arXiv 2401.08740, the linear interpolant).

    ``x_t = (1 - t) x0 + t noise`` with t = 0 the data and t = 1 the noise; the model learns ``v = noise - x0``. It is
    told ``1000 t`` so that one timestep embedder serves both objectives. A model with 2C channels is trained on the
    first C.

    Args:
        time: how t is drawn: ``"uniform"``, or ``"logit_normal"`` (sigmoid of a standard normal: more of the middle).

    Raises:
        ValueError: unknown ``time``.
    """

    def __init__(self, time: str = "uniform") -> None:
        if time not in ("uniform", "logit_normal"):
            raise ValueError(f"time is {time!r}; accepted: uniform, logit_normal")
        self.time = time

    def __call__(
        self, model_fn: ModelFn, x0: Tensor, y: Tensor, generator: Generator | None = None
    ) -> dict[str, Tensor]:
        """Losses at random times; arguments as in :class:`DiTObjective`, with t float in [0, 1000] for the model.

        Returns:
            ``loss``, ``mse`` (the same) and ``t`` as the model sees it, each (B,).
        """
        return self.losses(model_fn, x0, y, *self.draw(x0.shape, x0.device, generator, x0.dtype))

    def draw(
        self,
        shape: Sequence[int],
        device: torch.device,
        generator: Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        """The random times (B,) and noise (B, C, H, W), float32 at least, that ``losses`` takes for data of a shape."""
        wide = _wide(dtype)
        draw = torch.rand if self.time == "uniform" else torch.randn
        t = draw(shape[:1], device=device, dtype=wide, generator=generator)
        noise = torch.randn(shape, device=device, dtype=wide, generator=generator)
        return t if self.time == "uniform" else t.sigmoid(), noise

    def losses(self, model_fn: ModelFn, x0: Tensor, y: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """The same at given times ``t`` (B,) in [0, 1] and with given noise."""
        _check_data(x0)
        time = t.view(-1, 1, 1, 1)
        clean = x0.to(noise.dtype)
        x_t = (1 - time) * clean + time * noise
        out = model_fn(x_t.to(x0.dtype), t * TRAIN_STEPS, y).to(noise.dtype)
        _check_output(out, x0, (x0.shape[1], 2 * x0.shape[1]))
        mse = ((out[:, : x0.shape[1]] - (noise - clean)) ** 2).flatten(1).mean(1)
        return {"loss": mse, "mse": mse, "t": t * TRAIN_STEPS}


def _vlb_bits(schedule: NoiseSchedule, x0: Tensor, x_t: Tensor, t: Tensor, error: Tensor, variance: Tensor) -> Tensor:
    """(B,): one term of the bound, bits per element.

    ``error`` is noise - eps_hat; ``variance`` from -1 to 1 spans min to max log variance.
    """
    low, high = _column(schedule.min_log_variance, t), _column(schedule.max_log_variance, t)
    log_variance = low + (variance + 1) / 2 * (high - low)
    # The model's mean minus the posterior's, from the error: as a difference of two means it would cancel at small t.
    to_x0, to_xt = _column(schedule.posterior_x0, t), _column(schedule.posterior_xt, t)
    shift = to_x0 * _column(schedule.noise_scale, t) / _column(schedule.data_scale, t) * error
    kl = gaussian_kl(shift, low, log_variance)
    decoder = -discretized_gaussian_log_likelihood(x0, to_x0 * x0 + to_xt * x_t + shift, log_variance)
    return torch.where((t == 0).view(-1, 1, 1, 1), decoder, kl).flatten(1).mean(1) / math.log(2)


@cache
def _schedule_on(device: torch.device, dtype: torch.dtype) -> NoiseSchedule:
    return linear_schedule().to(device, dtype)


def _column(values: Tensor, t: Tensor) -> Tensor:
    return values[t].view(-1, 1, 1, 1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _check_data(x0: Tensor) -> None:
    if x0.dim() != 4 or not x0.is_floating_point():
        raise ValueError(f"x0 has shape {shape_of(x0)} and dtype {x0.dtype}; accepted: (B, C, H, W), floating point")


def _check_output(out: Tensor, x0: Tensor, channels: tuple[int, ...]) -> None:
    b, _, h, w = x0.shape
    if out.shape[1:2] not in [(c,) for c in channels] or (out.shape[0], *out.shape[2:]) != (b, h, w):
        wanted = " or ".join(f"({b}, {c}, {h}, {w})" for c in channels)
        raise ValueError(f"the model returned shape {shape_of(out)}; this objective needs {wanted}")
