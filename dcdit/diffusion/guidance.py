"""Classifier-free guidance (arXiv 2207.12598) with both branches in one forward pass."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dcdit.diffusion.samplers import Predict
from dcdit.diffusion.schedule import TRAIN_STEPS
from dcdit.utils.modules import accepts_keyword, name_of

Fraction = float | Tensor | Callable[[float], float]
"""rho: a number, a tensor (B,) with one for each image, or a function of the time in [0, 1] (1 is noise)."""


def guided(
    model: Callable[..., Tensor],
    y: Tensor,
    scale: float = 1.0,
    null_class: int | None = None,
    channels: int | str = 3,
    interval: tuple[float, float] | None = None,
    drop_fraction: Fraction | tuple[Fraction, Fraction] | None = None,
    budget: int | None = None,
) -> Predict:
    """The model with fixed labels, guidance and budget: a function ``(x, t) -> output`` for the samplers.

    The first ``channels`` channels become ``null + scale * (conditional - null)``. The others (the rest of the
    prediction, and the variance) are those of the conditional branch. At scale 1 the null branch is not computed.

    Args:
        model: called as ``model(x, t, y)``, plus ``drop_fraction`` and ``budget`` if they are given here.
        y: (B,) labels.
        scale: guidance scale; 1 is none.
        null_class: label of the unconditional branch (``num_classes`` in DiT); needed unless scale is 1.
        channels: how many channels are guided (at most C); ``"all"`` is C. DiT and SiT guide three of the four latent
            channels, and so do the published numbers.
        interval: guide only at times in [low, high] of [0, 1], where 1 is noise (arXiv 2404.07724).
        drop_fraction: rho of a dynamic model: a number, a (B,) tensor with one for each image, or a function of the
            time in [0, 1]. A pair gives (conditional, null) their own, which is Lite-CFG (arXiv 2603.06351: up to 0.9
            for the null branch).
        budget: kept tokens per image of a dynamic model.

    Raises:
        ValueError: an option out of range, a missing null class, or a budget option that this model does not take.
    """
    if not 0 <= scale < math.inf:
        raise ValueError(f"cfg_scale is {scale}; accepted: a finite number, at least 0")
    if scale != 1 and null_class is None:
        raise ValueError(
            f"cfg_scale is {scale} but there is no null class; give null_class, or train with label dropout"
        )
    if channels != "all" and (not isinstance(channels, int) or channels < 1):
        raise ValueError(f"cfg channels are {channels!r}; accepted: a positive integer, or 'all'")
    low, high = check_interval(interval)
    for name, value in (("drop_fraction", drop_fraction), ("budget", budget)):
        if value is not None and not accepts_keyword(model, name):
            raise ValueError(
                f"{name} is {value} but {name_of(model)} takes none; accepted: a dynamic model such as DCDiT"
            )
    labels = y if null_class is None else torch.cat([y, torch.full_like(y, null_class)])

    def predict(x: Tensor, t: float) -> Tensor:
        images, width = x.shape[:2]
        both = scale != 1 and low <= t / TRAIN_STEPS <= high
        options: dict[str, Any] = {} if budget is None else {"budget": budget}
        if drop_fraction is not None:
            options["drop_fraction"] = _fractions(drop_fraction, t / TRAIN_STEPS, images, both, x.device)
        rows = 2 * images if both else images
        times = torch.full((rows,), t, device=x.device)
        out = model(torch.cat([x, x]) if both else x, times, labels[:rows], **options)
        if not both:
            return out
        conditional, null = out[:images], out[images:]
        count = width if channels == "all" else min(int(channels), width)
        mixed = null[:, :count] + scale * (conditional[:, :count] - null[:, :count])
        return torch.cat([mixed, conditional[:, count:]], dim=1)

    return predict


def check_interval(interval: tuple[float, float] | None) -> tuple[float, float]:
    """The times (low, high) of a guidance interval; None means all times, (0, 1).

    Raises:
        ValueError: not 0 <= low <= high <= 1.
    """
    low, high = interval or (0.0, 1.0)
    if not 0 <= low <= high <= 1:
        raise ValueError(f"cfg interval is {interval}; accepted: (low, high) with 0 <= low <= high <= 1")
    return low, high


def _fractions(
    given: Fraction | tuple[Fraction, Fraction], time: float, images: int, both: bool, device: torch.device
) -> float | Tensor:
    """The drop fraction for the model: a number where all rows share a constant one, else (rows,) float32.

    A number that varies over time must not reach the model, because torch.compile compiles anew for every number.
    """
    pair = given if isinstance(given, tuple) else (given, given)
    branches = [rho(time) if callable(rho) else rho for rho in (pair if both else pair[:1])]
    for rho in branches:
        if isinstance(rho, Tensor):
            if rho.shape != (images,):
                raise ValueError(f"drop_fraction has shape {tuple(rho.shape)}; accepted: ({images},), one per image")
        elif not 0 <= rho < 1:
            raise ValueError(f"drop_fraction is {rho} at time {time:g}; accepted: a number in [0, 1)")
    if all(isinstance(rho, float | int) for rho in pair) and len(set(branches)) == 1:
        return float(branches[0])
    return torch.cat(
        [
            rho.to(device, torch.float32) if isinstance(rho, Tensor) else torch.full((images,), rho, device=device)
            for rho in branches
        ]
    )
