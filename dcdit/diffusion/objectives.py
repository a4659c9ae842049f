"""Training objectives: how data is noised, what the model learns from it, and the loss.

One training pass is three lines::

    noisy = objective.noise(x0, t, noise)          # t and noise from objective.draw
    out = model(noisy.x, noisy.time, y)
    losses = objective.loss(out, noisy)            # {"loss": (B,), ...}

``objective(model, x0, y)`` does all of it at random times.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from dcdit.diffusion.likelihood import discretized_gaussian_log_likelihood, gaussian_kl
from dcdit.diffusion.schedule import TRAIN_STEPS, NoiseSchedule, linear_schedule
from dcdit.utils.text import shape_of

ModelFn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x (B, C, H, W), time (B,), y (B,)) -> (B, C or 2C, H, W)."""


class NoisyBatch(NamedTuple):
    """Noisy data: what the model sees, and what the loss needs beside the model's output.

    Example:
        >>> import torch
        >>> from dcdit.diffusion import create_objective
        >>> x0, noise = torch.ones(2, 4, 2, 2), torch.zeros(2, 4, 2, 2)
        >>> noisy = create_objective("flow").noise(x0, torch.tensor([0.0, 0.5]), noise)
        >>> noisy.x[:, 0, 0, 0].tolist(), noisy.time.tolist(), noisy.target[:, 0, 0, 0].tolist()
        ([1.0, 0.5], [0.0, 500.0], [-1.0, -1.0])
    """

    x: Tensor
    """(B, C, H, W) x_t in the dtype of x0: the model's input."""
    time: Tensor
    """(B,) the time as the model sees it, from 0 (data) to 1000 (noise)."""
    target: Tensor
    """(B, C, H, W) what the first C channels of the output should be, float32 at least."""
    x0: Tensor
    """(B, C, H, W) the clean data in the dtype of the target."""
    x_t: Tensor
    """(B, C, H, W) x in the dtype of the target, before it was rounded to the dtype of x0."""


class Objective(ABC):
    """The base of :class:`DiTObjective` and :class:`FlowMatchingObjective`.

    Example:
        >>> import torch
        >>> from dcdit.diffusion import create_objective
        >>> objective = create_objective("flow")
        >>> x0, y = torch.zeros(2, 4, 2, 2), torch.tensor([0, 1])
        >>> losses = objective(lambda x, t, y: 1000 * x / t[:, None, None, None], x0, y)  # exact for data of zeros
        >>> losses["loss"].max().item() < 1e-9
        True
    """

    def __call__(
        self, model_fn: ModelFn, x0: Tensor, y: Tensor, generator: Generator | None = None
    ) -> dict[str, Tensor]:
        """Losses at random times.

        Args:
            model_fn: called as ``model_fn(x, time, y)``; see :class:`NoisyBatch`.
            x0: (B, C, H, W) clean data.
            y: (B,) labels, handed on.
            generator: on x0's device; fixes the times and the noise.

        Returns:
            What :meth:`loss` returns.

        Raises:
            ValueError: x0 is not (B, C, H, W), or the model's output has the wrong shape.
        """
        return self.losses(model_fn, x0, y, *self.draw(x0.shape, x0.device, generator, x0.dtype))

    def losses(self, model_fn: ModelFn, x0: Tensor, y: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """The same at given times ``t`` and with given ``noise``, as :meth:`noise` takes them."""
        noisy = self.noise(x0, t, noise)
        return self.loss(model_fn(noisy.x, noisy.time, y), noisy)

    @abstractmethod
    def draw(
        self,
        shape: Sequence[int],
        device: torch.device,
        generator: Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        """Random times t (B,) and standard normal noise (B, C, H, W), float32 at least, for data of this shape."""

    @abstractmethod
    def t_at(self, level: float, x0: Tensor) -> Tensor:
        """(B,) the t of :meth:`noise` for x0 at a noise level: a fraction of the way from data (0) to noise (1)."""

    @abstractmethod
    def noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> NoisyBatch:
        """Put ``noise`` on x0 (B, C, H, W) at the times t (B,).

        Raises:
            ValueError: x0 is not (B, C, H, W) of a floating point dtype.
        """

    @abstractmethod
    def loss(self, out: Tensor, noisy: NoisyBatch) -> dict[str, Tensor]:
        """Losses of the model's output, each (B,): ``loss`` is minimised, the others are its parts and ``t``.

        They have the dtype of ``noisy.target``, float32 at least.

        Raises:
            ValueError: the output has the wrong shape.
        """


class DiTObjective(Objective):
    """Noise prediction with a learned variance, as DiT trains (arXiv 2212.09748; hybrid loss of arXiv 2102.09672).

    ``loss = mean (eps - eps_hat)^2 + vlb``. The vlb is the term of the variational bound at the drawn step, in bits per
    element: the KL to the true posterior, or at step 0 the discretised decoder. It trains the variance only: its
    gradient does not reach eps_hat. (The weight 0.001 of the paper times the 1000 steps that one term stands for is 1.)

    The time t is int64 in [0, 1000), for :meth:`noise` and for the model. :meth:`loss` returns ``loss``, ``mse``,
    ``vlb`` (with ``learn_sigma``) and ``t``.

    Args:
        learn_sigma: the model returns 2C channels, and the second half interpolates the log variance. Without it, the
            model returns C channels and there is no vlb.

    Example:
        >>> import torch
        >>> from dcdit.diffusion import DiTObjective
        >>> objective = DiTObjective(learn_sigma=False)
        >>> x0, noise = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
        >>> noisy = objective.noise(x0, torch.tensor([999]), noise)
        >>> objective.loss(noise, noisy)["mse"].item(), objective.loss(noise - 2, noisy)["mse"].item()
        (0.0, 4.0)
    """

    def __init__(self, learn_sigma: bool = True) -> None:
        self.learn_sigma = learn_sigma

    def draw(
        self,
        shape: Sequence[int],
        device: torch.device,
        generator: Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        t = torch.randint(TRAIN_STEPS, shape[:1], device=device, generator=generator)
        return t, torch.randn(shape, device=device, dtype=_upcast_dtype(dtype), generator=generator)

    def t_at(self, level: float, x0: Tensor) -> Tensor:
        return torch.full(x0.shape[:1], min(int(TRAIN_STEPS * level), TRAIN_STEPS - 1), device=x0.device)

    def noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> NoisyBatch:
        _check_data(x0)
        schedule = _schedule_on(x0.device, noise.dtype)
        clean = x0.to(noise.dtype)
        x_t = _column(schedule.data_scale, t) * clean + _column(schedule.noise_scale, t) * noise
        return NoisyBatch(x_t.to(x0.dtype), t, noise, clean, x_t)

    def loss(self, out: Tensor, noisy: NoisyBatch) -> dict[str, Tensor]:
        channels, t = noisy.x0.shape[1], noisy.time
        _check_output(out, noisy.x0, (2 * channels if self.learn_sigma else channels,))
        out = out.to(noisy.target.dtype)
        eps = out[:, :channels]
        mse = ((eps - noisy.target) ** 2).flatten(1).mean(1)
        if not self.learn_sigma:
            return {"loss": mse, "mse": mse, "t": t}
        vlb = _vlb_bits(noisy, noisy.target - eps.detach(), out[:, channels:])
        return {"loss": mse + vlb, "mse": mse, "vlb": vlb, "t": t}


class FlowMatchingObjective(Objective):
    """Velocity prediction on straight paths (flow matching; SiT, arXiv 2401.08740, the linear interpolant).

    ``x_t = (1 - t) x0 + t noise`` with t = 0 the data and t = 1 the noise; the model learns ``v = noise - x0``. A model
    with 2C channels is trained on the first C.

    The time t is a float in [0, 1] for :meth:`noise`; the model sees ``1000 t``, so that one timestep embedder serves
    both objectives. :meth:`loss` returns ``loss``, ``mse`` (the same) and ``t`` as the model sees it.

    Args:
        time: how t is drawn: ``"uniform"``, or ``"logit_normal"`` (sigmoid of a standard normal: more of the middle).

    Raises:
        ValueError: unknown ``time``.

    Example:
        >>> import torch
        >>> from dcdit.diffusion import FlowMatchingObjective
        >>> objective = FlowMatchingObjective()
        >>> noisy = objective.noise(torch.full((1, 1, 1, 1), 2.0), torch.tensor([0.25]), torch.full((1, 1, 1, 1), 6.0))
        >>> noisy.x.item(), noisy.target.item(), noisy.time.item()  # a quarter of the way; the velocity is 6 - 2
        (3.0, 4.0, 250.0)
    """

    def __init__(self, time: str = "uniform") -> None:
        if time not in ("uniform", "logit_normal"):
            raise ValueError(f"time is {time!r}; accepted: uniform, logit_normal")
        self.time = time

    def draw(
        self,
        shape: Sequence[int],
        device: torch.device,
        generator: Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        dtype = _upcast_dtype(dtype)
        draw = torch.rand if self.time == "uniform" else torch.randn
        t = draw(shape[:1], device=device, dtype=dtype, generator=generator)
        noise = torch.randn(shape, device=device, dtype=dtype, generator=generator)
        return t if self.time == "uniform" else t.sigmoid(), noise

    def t_at(self, level: float, x0: Tensor) -> Tensor:
        return torch.full(x0.shape[:1], level, device=x0.device, dtype=_upcast_dtype(x0.dtype))

    def noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> NoisyBatch:
        _check_data(x0)
        time = t.view(-1, 1, 1, 1)
        clean = x0.to(noise.dtype)
        x_t = (1 - time) * clean + time * noise
        return NoisyBatch(x_t.to(x0.dtype), t * TRAIN_STEPS, noise - clean, clean, x_t)

    def loss(self, out: Tensor, noisy: NoisyBatch) -> dict[str, Tensor]:
        channels = noisy.x0.shape[1]
        _check_output(out, noisy.x0, (channels, 2 * channels))
        velocity = out.to(noisy.target.dtype)[:, :channels]
        mse = ((velocity - noisy.target) ** 2).flatten(1).mean(1)
        return {"loss": mse, "mse": mse, "t": noisy.time}


def create_objective(name: str, learn_sigma: bool = True) -> Objective:
    """The objective called ``"dit"`` (:class:`DiTObjective`) or ``"flow"`` (:class:`FlowMatchingObjective`).

    Args:
        learn_sigma: whether the model has channels for a variance; flow matching leaves them alone.

    Raises:
        ValueError: unknown name.

    Example:
        >>> from dcdit.diffusion import create_objective
        >>> type(create_objective("dit")).__name__, type(create_objective("flow")).__name__
        ('DiTObjective', 'FlowMatchingObjective')
    """
    if name == "dit":
        return DiTObjective(learn_sigma)
    if name == "flow":
        return FlowMatchingObjective()
    raise ValueError(f"unknown objective {name!r}; accepted: dit, flow")


def _vlb_bits(noisy: NoisyBatch, error: Tensor, variance: Tensor) -> Tensor:
    """(B,): one term of the bound, bits per element.

    Args:
        error: (B, C, H, W) noise - eps_hat.
        variance: (B, C, H, W); -1 to 1 spans the smallest to the largest log variance.
    """
    t, schedule = noisy.time, _schedule_on(error.device, error.dtype)
    low, high = _column(schedule.min_log_variance, t), _column(schedule.max_log_variance, t)
    log_variance = low + (variance + 1) / 2 * (high - low)
    # The model's mean minus the posterior's. It comes from the error, because the difference of the two means would
    # cancel at small t.
    to_x0, to_xt = _column(schedule.posterior_x0, t), _column(schedule.posterior_xt, t)
    shift = to_x0 * _column(schedule.noise_scale, t) / _column(schedule.data_scale, t) * error
    kl = gaussian_kl(shift, low, log_variance)
    mean = to_x0 * noisy.x0 + to_xt * noisy.x_t + shift
    decoder = -discretized_gaussian_log_likelihood(noisy.x0, mean, log_variance)
    return torch.where((t == 0).view(-1, 1, 1, 1), decoder, kl).flatten(1).mean(1) / math.log(2)


@cache
def _schedule_on(device: torch.device, dtype: torch.dtype) -> NoiseSchedule:
    return linear_schedule().to(device, dtype)


def _column(values: Tensor, t: Tensor) -> Tensor:
    """values[t] as (B, 1, 1, 1)."""
    return values[t].view(-1, 1, 1, 1)


def _upcast_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: float64 stays, everything else becomes float32."""
    return torch.promote_types(dtype, torch.float32)


def _check_data(x0: Tensor) -> None:
    if x0.dim() != 4 or not x0.is_floating_point():
        raise ValueError(f"x0 has shape {shape_of(x0)} and dtype {x0.dtype}; accepted: (B, C, H, W), floating point")


def _check_output(out: Tensor, x0: Tensor, channels: tuple[int, ...]) -> None:
    b, _, h, w = x0.shape
    if out.shape[1:2] not in [(c,) for c in channels] or (out.shape[0], *out.shape[2:]) != (b, h, w):
        wanted = " or ".join(f"({b}, {c}, {h}, {w})" for c in channels)
        raise ValueError(f"the model returned shape {shape_of(out)}; this objective needs {wanted}")
