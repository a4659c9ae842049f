"""From labels to samples."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
from torch import Tensor

from dcdit.diffusion import samplers
from dcdit.diffusion.graphed import WORTHWHILE, SamplerGraphs, TakeStep, captured_model, obstacle_of
from dcdit.diffusion.guidance import Fraction, Guided, guided
from dcdit.diffusion.noise import ImageNoise
from dcdit.diffusion.samplers import Chain, Step
from dcdit.diffusion.schedule import space_timesteps
from dcdit.diffusion.schedulers import SchedulerRun
from dcdit.diffusion.step import SamplerStep
from dcdit.utils.modules import dtype_of, evaluating, name_of, unwrap_model

FITTING_METHODS = {"dit": ("ddpm", "ddim"), "flow": ("euler", "heun")}
"""An objective, as :func:`dcdit.diffusion.create_objective` names it, to the methods that sample what it trained."""
METHODS = tuple(method for methods in FITTING_METHODS.values() for method in methods)
"""The names of the sampling methods."""


@torch.no_grad()
def sample(
    model: Callable[..., Tensor],
    labels: Tensor,
    num_steps: int | str = 250,
    method: str = "ddpm",
    *,
    scheduler: Any = None,
    shape: tuple[int, int, int] | None = None,
    cfg_scale: float = 1.0,
    cfg_channels: int | str = 3,
    cfg_interval: tuple[float, float] | None = None,
    null_class: int | None = None,
    drop_fraction: Fraction | tuple[Fraction, Fraction] | None = None,
    budget: int | None = None,
    capacity: int | Literal["auto"] | None = None,
    eta: float = 0.0,
    clip: bool = False,
    seed: int = 0,
    first_index: int = 0,
    progress: bool = True,
    callback: Callable[[Step], object] | None = None,
    graph: bool | SamplerGraphs | None = None,
) -> Tensor:
    """Draw one sample per label, on the labels' device.

    The noise of an image depends only on ``seed`` and its index, so batches of any size give the same images on every
    device, up to rounding. A module in training mode is put into evaluation mode for the time of the sampling.

    Args:
        model: ``model(x, t, y)`` that returns (B, C or 2C, H, W): a :class:`dcdit.models.DCDiT`, a
            :class:`dcdit.models.DiT` or any function.
        labels: (B,) integer classes.
        num_steps: 1 to 1000, or ``"ddimN"``, for ddpm and ddim (see :func:`space_timesteps`); any positive number for
            euler, heun and schedulers. Heun calls the model twice per step.
        method: one of :data:`METHODS`. It must fit the objective that trained the model: ddpm and ddim fit
            :class:`dcdit.diffusion.DiTObjective`, euler and heun :class:`dcdit.diffusion.FlowMatchingObjective`. A
            model that says what trained it, as those of :func:`dcdit.checkpoint.load_model` do in ``model.objective``,
            is checked.
        scheduler: one of diffusers (DDIM, DPM-Solver++, UniPC, flow-match Euler, ...) to use instead of a method. It
            must fit the objective as a method must, and its configuration decides what ``clip`` would. Noise that it
            adds in a step is that of the seed and the index, too.
        shape: (C, H, W) of a sample; taken from ``model.config`` if None.
        cfg_scale, cfg_channels, cfg_interval, drop_fraction, budget, capacity: see :func:`guided`. If a capacity was
            too small, a warning at the end says how many tokens were lost. A model that records its calls
            (:class:`dcdit.sample.ModelCalls`) gets the numbers instead.
        null_class: label of the unconditional branch; taken from ``model.config`` if None.
        eta: noise of ddim.
        clip: clamp the expected clean data to [-1, 1] at every step of ddpm or ddim: for pixels, not for latents.
        seed, first_index: the images are those of this seed with index ``first_index`` to ``first_index + B - 1``.
        progress: show a bar, if tqdm is installed.
        callback: called after every step with a :class:`Step`.
        graph: replay each step from a CUDA graph. True: an error where that cannot be, see
            :func:`dcdit.graphs.graph_obstacle`. A :class:`SamplerGraphs` is the same, and keeps the graphs for the next
            call. None: where it can be and the run has at least 20 steps.

    Returns:
        (B, C, H, W) float32 (float64 for a float64 model).

    Raises:
        ValueError: an option that is not accepted, or that this model or method does not take.
        CaptureError: a graph was asked for and its capture failed.

    Example:
        >>> import torch
        >>> from dcdit.diffusion import sample
        >>> def model(x, t, y):  # the velocity towards data that are 2 everywhere
        ...     return (x - 2) / (t[:, None, None, None] / 1000)
        >>> x = sample(model, torch.tensor([0, 1]), num_steps=5, method="euler", shape=(1, 2, 2), progress=False)
        >>> torch.allclose(x, torch.full((2, 1, 2, 2), 2.0), atol=1e-5)
        True
        >>> options = {"num_steps": 5, "method": "heun", "shape": (1, 2, 2), "progress": False}
        >>> alone = sample(lambda x, t, y: x * 0, torch.tensor([1]), first_index=1, **options)  # no velocity: noise
        >>> torch.equal(alone, sample(lambda x, t, y: x * 0, torch.tensor([0, 1]), **options)[1:])
        True
    """
    objective, source = getattr(unwrap_model(model), "objective", None), name_of(model)
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; accepted: {', '.join(METHODS)}")
    if scheduler is None:
        check_method(method, objective, source)
    if labels.dim() != 1 or labels.is_floating_point():
        raise ValueError(f"labels have shape {tuple(labels.shape)} and dtype {labels.dtype}; accepted: (B,), integer")
    config = getattr(unwrap_model(model), "config", None)
    if shape is None:
        if config is None:
            raise ValueError(f"shape is None and {source} has no config; accepted: (C, H, W)")
        shape = (config.in_channels, *config.grid)
    if null_class is None and config is not None and config.class_dropout_prob > 0:
        null_class = config.num_classes
    if scheduler is None:
        chain = _chain(method, num_steps, eta, clip)
    else:
        _refuse_beside_scheduler(method, clip, graph)
        generators = _generators(seed, first_index, len(labels))
        run = SchedulerRun(scheduler, num_steps, objective, source, eta, generators)
    calls = guided(model, labels, cfg_scale, null_class, cfg_channels, cfg_interval, drop_fraction, budget, capacity)
    dtype = torch.promote_types(dtype_of(model), torch.float32)
    noise = ImageNoise(seed, first_index, labels.shape[0], shape, labels.device, dtype)
    if scheduler is not None:
        x, overflow = _sample_by_scheduler(run, calls, noise, progress, callback)
        _warn_of_overflow(calls, overflow, len(run.times))
        return x
    step = SamplerStep(chain, calls, noise, dtype)
    x, overflow = step.x, step.overflow
    with evaluating(captured_model(model)), progress_bar(len(chain.times), progress, "sampling", "step") as advance:
        take, overwrites = _take_step(step, graph)
        for number, (times, branches) in enumerate(zip(chain.times, step.branches, strict=True)):
            x, x0, seen, overflow = take(branches)
            for noted in seen if calls.observed else ():
                model.record(_copied(noted) if overwrites else noted)  # type: ignore[attr-defined]
            advance()
            if callback is not None:
                callback(Step(number, times[0], x.clone() if overwrites else x, x0.clone() if overwrites else x0))
    _warn_of_overflow(calls, overflow, len(chain.times))
    return x.clone() if overwrites else x


def _sample_by_scheduler(
    run: SchedulerRun, calls: Guided, noise: ImageNoise, progress: bool, callback: Callable[[Step], object] | None
) -> tuple[Tensor, Tensor]:
    overflow = torch.zeros((), dtype=torch.int64, device=calls.labels.device)

    def model(x: Tensor, time: float) -> Tensor:
        out, seen = calls.at(x, time)
        if calls.observed:
            calls.model.record(seen)  # type: ignore[attr-defined]
        elif seen is not None:
            overflow.add_(seen["overflow"])
        return out

    x = run.start(noise(torch.zeros((), dtype=torch.int64, device=calls.labels.device)))
    with evaluating(captured_model(calls.model)), progress_bar(len(run.times), progress, "sampling", "step") as advance:
        for number, time in enumerate(run.times):
            x, x0 = run.step(number, model, x)
            advance()
            if callback is not None:
                callback(Step(number, time, x, x0))
    return x, overflow


def _refuse_beside_scheduler(method: str, clip: bool, graph: bool | SamplerGraphs | None) -> None:
    for name, value, default in (("method", method, "ddpm"), ("clip", clip, False), ("graph", graph or False, False)):
        if value != default:
            raise ValueError(f"{name} is {value!r} beside a scheduler, which takes its place; accepted: leave one out")


def _generators(seed: int, first_index: int, count: int) -> list[torch.Generator]:
    """One for each image, on the CPU: the noise of an image depends on neither the batch nor the device."""
    return [
        torch.Generator().manual_seed((seed * 2**32 + index) % 2**63)
        for index in range(first_index, first_index + count)
    ]


def _take_step(step: SamplerStep, graph: bool | SamplerGraphs | None) -> tuple[TakeStep, bool]:
    """What takes a step, and whether it overwrites its results: a graph, or the step itself."""
    if graph is None and (len(step.branches) < WORTHWHILE or obstacle_of(step.guided)):
        graph = False
    if graph is False:
        return step, False
    graphs = graph if isinstance(graph, SamplerGraphs) else SamplerGraphs(optional=graph is None)
    return graphs.adopt(step), True


def _warn_of_overflow(calls: Guided, overflow: Tensor, steps: int) -> None:
    if calls.capacity is not None and not calls.observed and int(overflow) > 0:
        text = (
            f"capacity={calls.capacity!r} was too small: {int(overflow)} tokens, those of the lowest p, were dropped "
            f"in {steps} steps"
        )
        warnings.warn(text, stacklevel=4)


def _copied(noted: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in noted.items()}


def check_method(method: str, objective: object, source: str) -> None:
    """Raise ValueError where a method does not fit the objective that trained a model.

    Args:
        objective: as in :data:`FITTING_METHODS`. Anything else does not say what trained the model and is not checked.
        source: the model or its file, for the message.
    """
    methods = FITTING_METHODS.get(objective, METHODS) if isinstance(objective, str) else METHODS
    if method not in methods:
        raise ValueError(
            f"{source} was trained with the objective {objective!r}, which the method {method!r} does not fit; "
            f"accepted: {', '.join(methods)}"
        )


def _chain(method: str, num_steps: int | str, eta: float, clip: bool) -> Chain:
    """The sampler with its options."""
    if eta != 0 and method != "ddim":
        raise ValueError(f"eta is {eta}, but {method} has none; accepted: 0, or method ddim")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; accepted: a number in [0, 1]")
    if method in ("ddpm", "ddim"):
        timesteps = space_timesteps(num_steps)
        return samplers.ddpm(timesteps, clip) if method == "ddpm" else samplers.ddim(timesteps, eta, clip)
    if clip:
        raise ValueError(f"clip is for ddpm and ddim, not {method}")
    if not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"num_steps is {num_steps!r}; accepted for {method}: a positive integer")
    return samplers.euler(num_steps) if method == "euler" else samplers.heun(num_steps)


@contextmanager
def progress_bar(total: int, wanted: bool, name: str, unit: str) -> Iterator[Callable[[], object]]:
    """A function that advances a progress bar by one step. It does nothing without tqdm, or if no bar is ``wanted``."""
    bars: Any = None
    if wanted:
        with suppress(ImportError):
            from tqdm import auto as bars
    if bars is None:
        yield lambda: None
        return
    with bars.tqdm(total=total, desc=name, unit=unit) as bar:
        yield bar.update
