"""Schedulers of diffusers in the place of our samplers.

diffusers is not imported here. A scheduler is what has ``set_timesteps`` and ``step``, and a ``config`` that says what
the model has to predict.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dcdit.diffusion.schedule import TRAIN_STEPS, linear_schedule
from dcdit.utils.modules import accepts_keyword

PREDICTIONS = {"epsilon": "dit", "flow_prediction": "flow"}
"""What a scheduler wants a model to predict, to the objective that trains it."""
FITTING_SCHEDULERS = {
    "dit": "one of noise prediction, such as DDIMScheduler or DPMSolverMultistepScheduler",
    "flow": "one of flow matching, such as FlowMatchEulerDiscreteScheduler, or UniPCMultistepScheduler with "
    "prediction_type='flow_prediction' and use_flow_sigmas=True",
}
LEARNED = ("learned", "learned_range")


class SchedulerRun:
    """A run of a scheduler, except for the model and the noise that it starts from.

    Args:
        scheduler: of diffusers. Its timesteps are set, on the CPU, so that no step waits for a GPU.
        num_steps: at least 1.
        objective: that trained the model, "dit" or "flow"; None if that is not known.
        source: the model or its file, for error messages.
        eta: noise of DDIM, for schedulers that have it.
        generator: of the noise that some schedulers add in each step; a list has one for each image.

    Raises:
        ValueError: the scheduler does not fit the objective or the noise schedule that models are trained with, or an
            option that it does not take.
    """

    def __init__(
        self,
        scheduler: Any,
        num_steps: int | str,
        objective: str | None,
        source: str,
        eta: float = 0.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> None:
        self._predicted = check_scheduler(scheduler, objective, source)
        self._scheduler = scheduler
        self._options: dict[str, Any] = {}
        if accepts_keyword(scheduler.step, "eta"):
            self._options["eta"] = eta
        elif eta != 0:
            raise ValueError(f"eta is {eta}, but {type(scheduler).__name__} has none; accepted: 0")
        if accepts_keyword(scheduler.step, "generator"):
            self._options["generator"] = generator
        if accepts_keyword(scheduler.step, "use_clipped_model_output"):
            # The noise of a clipped x0, as in our DDIM and in the original one. Without clipping it changes nothing.
            self._options["use_clipped_model_output"] = True
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
            raise ValueError(f"num_steps is {num_steps!r}; accepted for a scheduler: a positive integer")
        if type(scheduler).__name__.startswith("FlowMatch") and accepts_keyword(scheduler.set_timesteps, "sigmas"):
            # By default these leave out the last 0.1 % of the way to the data. These are the times of our Euler method.
            scheduler.set_timesteps(num_steps, sigmas=[1 - number / num_steps for number in range(num_steps)])
        else:
            scheduler.set_timesteps(num_steps)
        self.times: list[float] = scheduler.timesteps.tolist()
        """Of each step, as the model sees them, from 1000 (noise) down to 0. Some schedulers see a time twice."""

    def start(self, noise: Tensor) -> Tensor:
        """The first state, from standard normal noise."""
        return noise * getattr(self._scheduler, "init_noise_sigma", 1.0)

    def step(self, number: int, model: Callable[[Tensor, float], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W) after the step of this number, and the clean data that the model expects."""
        timestep, time = self._scheduler.timesteps[number], self.times[number]
        scale = getattr(self._scheduler, "scale_model_input", None)  # schedulers of flow matching have none
        seen = x if scale is None else scale(x, timestep)
        out = model(seen, time).to(x.dtype)
        prediction = out[:, : x.shape[1]]
        given = out if self._takes_variance(out.shape[1], x.shape[1]) else prediction
        after = self._scheduler.step(given, timestep, x, **self._options).prev_sample
        return after, self._clean_data(seen, prediction, time)

    def _takes_variance(self, outputs: int, channels: int) -> bool:
        """Whether the scheduler wants the variance that the model has learned. DDPM's is the only one that may."""
        if vars(self._scheduler).get("variance_type") not in LEARNED:
            return False
        if outputs != 2 * channels:
            raise ValueError(
                f"{type(self._scheduler).__name__} has the variance_type {self._scheduler.config['variance_type']!r}, "
                "but the model learned no variance; accepted: fixed_small, fixed_large"
            )
        return True

    def _clean_data(self, seen: Tensor, prediction: Tensor, time: float) -> Tensor:
        """What the model expects, from its own input: it does not depend on how a scheduler scales its states."""
        if self._predicted == "flow":
            return seen - time / TRAIN_STEPS * prediction
        variance = _noise_variance(time)
        return (seen - math.sqrt(variance) * prediction) / math.sqrt(1 - variance)


def check_scheduler(scheduler: Any, objective: str | None, source: str) -> str:
    """The objective, "dit" or "flow", whose models a scheduler samples.

    Raises:
        ValueError: it does not fit the model's, or wants what no model here is trained for.
    """
    name, config = type(scheduler).__name__, scheduler.config
    prediction = config.get("prediction_type", "flow_prediction" if name.startswith("FlowMatch") else None)
    wanted = PREDICTIONS.get(str(prediction))
    if wanted is None:
        raise ValueError(
            f"{name} has the prediction_type {prediction!r}, which no model here is trained for; accepted: "
            f"{', '.join(PREDICTIONS)}"
        )
    if objective in FITTING_SCHEDULERS and objective != wanted:
        raise ValueError(
            f"{source} was trained with the objective {objective!r}, which {name} (prediction_type {prediction!r}) "
            f"does not fit; accepted: {FITTING_SCHEDULERS[str(objective)]}"
        )
    if wanted == "dit":
        _check_noise_schedule(scheduler, name, config)
    elif "use_flow_sigmas" in config and not config["use_flow_sigmas"]:
        raise ValueError(f"{name} has use_flow_sigmas=False beside {prediction!r}; accepted: use_flow_sigmas=True")
    return wanted


def _check_noise_schedule(scheduler: Any, name: str, config: Mapping[str, Any]) -> None:
    ours, theirs = linear_schedule().alpha_bar, getattr(scheduler, "alphas_cumprod", None)
    if theirs is None or theirs.shape != ours.shape or not torch.allclose(theirs.double().cpu(), ours, atol=1e-5):
        keys = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "rescale_betas_zero_snr")
        has = ", ".join(f"{key}={config[key]!r}" for key in keys if key in config)
        raise ValueError(
            f"{name} has another noise schedule ({has}); accepted: that of the training, num_train_timesteps=1000, "
            "beta_schedule='linear', beta_start=0.0001, beta_end=0.02"
        )
    if config.get("variance_type") in LEARNED and "variance_type" not in vars(scheduler):
        raise ValueError(
            f"{name} with variance_type={config['variance_type']!r} cuts every prediction to 3 channels; accepted: None"
        )


def _noise_variance(time: float) -> float:
    """1 - alpha_bar at a step of the training schedule; between two steps, sigma is interpolated as in diffusers."""
    alpha_bar = linear_schedule().alpha_bar
    low = min(int(time), TRAIN_STEPS - 1)
    sigmas = [math.sqrt((1 - a) / a) for a in alpha_bar[[low, min(low + 1, TRAIN_STEPS - 1)]].tolist()]
    sigma = sigmas[0] + (time - low) * (sigmas[1] - sigmas[0])
    return sigma**2 / (1 + sigma**2)
