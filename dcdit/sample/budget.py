"""Choosing a drop fraction for a budget of FLOPs or of seconds, from costs measured at several fractions.

The measurement is a short pilot run: the same sampler on one batch, a few steps at each fraction. A run of any length,
with any guidance interval, consists of such calls. So its cost is the pilot's cost at the times of its own calls. The
pilot goes through the fractions twice, there and back, so that a machine that becomes slower or faster on the way does
so for all fractions alike.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcdit.diffusion import sample
from dcdit.diffusion.sampling import progress_bar
from dcdit.models import DCDiT, SlicedModel
from dcdit.profiling.reliability import DISAGREEMENT
from dcdit.profiling.rounds import disagreement, spread
from dcdit.profiling.timing import Clock, Mark
from dcdit.sample.model_calls import ModelCalls, call_times
from dcdit.sample.options import Guidance
from dcdit.utils.modules import evaluating
from dcdit.utils.reading import read_json
from dcdit.utils.text import one_line, printable

PILOT_FRACTIONS = (0.0, 0.3, 0.6, 0.9)
PILOT_STEPS = 16


@dataclass(frozen=True)
class CostTable:
    """Cost per image of a whole sampling run at several drop fractions.

    Example:
        >>> from dcdit.sample import CostTable
        >>> table = CostTable("TFLOPs", "pilot", drop_fractions=[0.0, 0.5, 0.9], costs=[10.0, 6.0, 2.0])
        >>> table.choose(8.0)  # the least drop fraction that costs at most 8
        (0.25, 8.0)
    """

    unit: str
    source: str
    """Where it was measured."""
    drop_fractions: list[float]
    """Ascending."""
    costs: list[float]
    spread: float | None = None
    """How far the times behind it scatter (:func:`dcdit.profiling.rounds.spread`), the largest of the fractions. None
    for counts, and for times whose spread is not known."""
    warnings: list[str] = field(default_factory=list)
    """Why a choice by this table may miss its target."""

    def choose(self, target: float) -> tuple[float, float]:
        """The least drop fraction whose cost is at most the target, and that cost, interpolated.

        A cost that rises with the fraction is noise of the clock: the least cost at smaller fractions replaces it.

        Raises:
            ValueError: the target is below the cost at the largest fraction.
        """
        falling = np.minimum.accumulate(self.costs)
        least, most = falling[-1], falling[0]
        if not target >= least:
            raise ValueError(
                f"the target is {target:g} {self.unit} per image; reachable: {least:.4g} (drop fraction "
                f"{self.drop_fractions[-1]:g}) to {most:.4g} (drop fraction {self.drop_fractions[0]:g})"
            )
        rho = float(np.interp(target, falling[::-1], self.drop_fractions[::-1]))
        return rho, float(np.interp(rho, self.drop_fractions, falling))


def measure_costs(
    model: DCDiT,
    labels: Tensor,
    num_steps: int | str,
    method: str,
    guidance: Guidance,
    *,
    seed: int = 0,
    clip: bool = False,
    progress: bool = True,
) -> tuple[CostTable, CostTable]:
    """TFLOPs and seconds per image of a sampling run, from a pilot of this batch on the labels' device.

    FLOPs are counted from the lengths that the pilot kept. Seconds hold for this machine and this batch size. They are
    those of the sampler alone, without the decoding of latents.

    Args:
        labels: (B,) integer.
        num_steps, method: of the run whose cost is wanted, see :func:`dcdit.diffusion.sample`.
        guidance: of that run.
        seed, clip: see :func:`dcdit.diffusion.sample`.
        progress: show a bar over the drop fractions.

    Example:
        >>> import torch
        >>> from dcdit.models import create_model
        >>> from dcdit.sample import Guidance, measure_costs
        >>> model = create_model("DC-DiT-S", grid=(4, 4), hidden_size=128, depth=1, num_heads=2, num_classes=10).eval()
        >>> tflops, seconds = measure_costs(model, torch.tensor([3, 7]), 2, "euler", Guidance(), progress=False)
        >>> tflops.unit, tflops.drop_fractions, tflops.costs == sorted(tflops.costs, reverse=True)
        ('TFLOPs', [0.0, 0.3, 0.6, 0.9], True)
    """
    times = call_times(method, num_steps)
    guided = [guidance.at(t) for t in times]
    options: Any = {"cfg_scale": guidance.scale, "cfg_interval": guidance.interval}
    options |= {"clip": clip, "seed": seed, "progress": False}
    fractions = list(PILOT_FRACTIONS)
    tflops: dict[float, float] = {}
    seconds: dict[float, list[float]] = {rho: [] for rho in fractions}
    spreads = []
    counts = [min(steps, len(times)) for steps in (1, PILOT_STEPS // 2, PILOT_STEPS)]
    if model.config.dynamic_width:
        # As a run of sampling calls it.
        model = SlicedModel(model, [t for steps in counts for t in call_times(method, steps)])  # type: ignore[assignment]
    with evaluating(model), progress_bar(2 * len(fractions), progress, "pilot", "fraction") as advance:
        sample(_Pilot(model, len(labels), 0.0, guidance), labels, 1, method, **options)  # a first call is slow
        for rho in [*fractions, *reversed(fractions)]:
            pilot = _Pilot(model, len(labels), rho, guidance)
            # The second time, half of the steps are enough to see whether the clock says the same.
            sample(pilot, labels, counts[1 if rho in tflops else 2], method, **options)
            cost = [np.where(guided, *pair) for pair in zip(pilot.at(times, True), pilot.at(times, False), strict=True)]
            tflops.setdefault(rho, float(cost[0].sum()) / 1e3)
            seconds[rho].append(float(cost[1].sum()))
            spreads.append(pilot.spread())
            advance()
    source = f"a pilot of {len(labels)} images on this machine"
    scatter, means = max(filter(math.isfinite, spreads), default=None), [sum(both) / 2 for both in seconds.values()]
    noise = _noise(fractions, means, scatter) + _drift(seconds)
    return CostTable("TFLOPs", source, fractions, list(tflops.values())), CostTable(
        "seconds", source, fractions, means, scatter, noise
    )


def _drift(seconds: dict[float, list[float]]) -> list[str]:
    """Where the clock said something else the second time."""
    apart = {rho: disagreement(*both) for rho, both in seconds.items()}
    rho = max(apart, key=apart.__getitem__)
    first, second = seconds[rho]
    text = f"the pilot took {first:.3g} s at drop fraction {rho:g} the first time and {second:.3g} s the second"
    return [text] if apart[rho] > DISAGREEMENT else []


def _noise(fractions: Sequence[float], seconds: Sequence[float], scatter: float | None) -> list[str]:
    """What shows that the clock of a pilot is noisy."""
    found = []
    if scatter is not None and scatter > DISAGREEMENT:
        found.append(f"the times of the pilot's calls scatter by ±{scatter:.0%} (half the interquartile range)")
    for (less, shorter), (more, longer) in pairwise(zip(fractions, seconds, strict=True)):
        if longer > (1 + DISAGREEMENT) * shorter:
            found.append(f"the pilot took {shorter:.3g} s at drop fraction {less:g} and {longer:.3g} s at {more:g}")
    return found


def seconds_from_profile(
    path: str | Path, times: Sequence[float], guidance: Guidance, device: str, dtype: str
) -> CostTable:
    """Seconds per image of a sampling run with model calls at these times, from a profile.json of ``dcdit profile``.

    Each row of a call is taken to cost what a row of the profile's batch cost at that drop fraction. The file does not
    say which model was profiled, nor on what inputs. An unreliable profile gives a table with a warning; that a profile
    is reliable is only known of those written since it is judged.

    Args:
        path: of the profile. Before ``variants``, the list in it was called ``sides``; both are read.
        device, dtype: of the run, as :class:`dcdit.profiling.profile.Profile` names them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no profile, it was measured with another device, dtype or thread count, or it lacks drop
            fractions to interpolate between.
    """
    try:
        profile = read_json(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"no profile {str(path)!r}; dcdit profile --checkpoint writes one") from None
    try:
        variants = profile["variants"] if "variants" in profile else profile["sides"]
        dynamic = [variant for variant in variants if variant["drop_fraction"] is not None]
        for variant in dynamic:
            _check_number("drop_fraction", variant["drop_fraction"], at_least=0, below=1)
            _check_number("ms", variant["ms"], at_least=1e-9)
            _check_number("spread", variant.get("spread", 0), at_least=0)
        _check_number("batch", profile["batch"], at_least=1)
        dynamic.sort(key=lambda variant: variant["drop_fraction"])
        fractions = [float(variant["drop_fraction"]) for variant in dynamic]
        per_row = [variant["ms"] / profile["batch"] / 1e3 for variant in dynamic]
        measured = (profile["device"], profile["dtype"], profile["threads"])
        scatter = max((variant["spread"] for variant in dynamic if "spread" in variant), default=None)
        why = printable(profile["warnings"][0]) if not profile.get("reliable", True) else None
        warnings = [] if why is None else [f"{path} is unreliable: {why}"]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        found = f"no {error}" if isinstance(error, KeyError) else one_line(error)
        raise ValueError(f"{path} is no profile ({found}); accepted: the profile.json of dcdit profile") from None
    except ValueError as error:
        raise ValueError(f"{path} is no profile: {error}") from None
    here = (device, dtype, torch.get_num_threads())
    if measured != here:
        then, now = (f"{name}, {kind}, {threads} threads" for name, kind, threads in (measured, here))
        raise ValueError(f"{path} was measured on {then}; this run has {now}: profile again")
    null = guidance.null_drop_fraction
    if len(fractions) < 2 or (null is not None and not fractions[0] <= null <= fractions[-1]):
        raise ValueError(
            f"{path} holds the drop fractions {fractions}; accepted: at least two, with that of the null branch "
            f"({null}) between them"
        )
    guided = sum(guidance.at(t) for t in times)
    null_rows = per_row if null is None else [float(np.interp(null, fractions, per_row))] * len(per_row)
    costs = [len(times) * row + guided * null_row for row, null_row in zip(per_row, null_rows, strict=True)]
    return CostTable("seconds", str(path), fractions, costs, scatter, warnings)


def _check_number(name: str, value: Any, at_least: float, below: float = math.inf) -> None:
    """ValueError for what is no number, or none within the bounds."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # The times of a few calls have no spread that is a number.
    if not number or not (at_least <= value < below or (name == "spread" and math.isnan(value))):
        raise ValueError(f"{name} is {value!r}; accepted: a number from {at_least:g}, below {below:g}")


class _Pilot:
    """A model at one drop fraction that records GFLOPs and seconds of its calls. A sampler takes it as the model.

    Calls with both branches of guidance and calls with one are recorded separately. With a guidance interval each call
    runs both ways, so that both costs are known at all times. The sampler gets the output that it asked for.
    """

    def __init__(self, model: DCDiT, images: int, rho: float, guidance: Guidance) -> None:
        self.config, self.objective, self.images = model.config, model.objective, images
        null = rho if guidance.null_drop_fraction is None else guidance.null_drop_fraction
        self._rho = torch.tensor([rho] * images + [null] * images, device="cpu")
        self._both_ways = guidance.scale != 1 and guidance.interval is not None
        self._calls = {guided: ModelCalls(model, images) for guided in (True, False)}
        self._marks: dict[bool, list[tuple[Mark, Mark]]] = {True: [], False: []}

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out, n = self._run(x, t, y), self.images
        if self._both_ways and len(x) > n:
            self._run(x[:n], t[:n], y[:n])
        elif self._both_ways:
            null = torch.full_like(y, self.config.num_classes)
            self._run(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]))
        return out

    def _run(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        clock, guided = Clock(x.device), len(x) > self.images
        rho = self._rho[: len(x)].to(x.device)
        start = clock.mark()
        out = self._calls[guided](x, t, y, drop_fraction=rho)
        self._marks[guided].append((start, clock.mark()))
        return out

    def spread(self) -> float:
        """Of the calls' times, the larger of the two kinds; NaN for fewer than 3 calls.

        What is kept changes from call to call, and the times with it. The ratios of successive times hold little of
        that, and the noise of two.
        """
        scatter = [math.nan]
        for marks in self._marks.values():
            times = [Clock.milliseconds(*pair) for pair in marks]
            scatter.append(spread([b / a for a, b in pairwise(times)]) / math.sqrt(2))
        return max(filter(math.isfinite, scatter), default=math.nan)

    def at(self, times: Sequence[float], guided: bool) -> tuple[np.ndarray, np.ndarray]:
        """GFLOPs and seconds per image of calls at these times, interpolated; zeros if there were no such calls."""
        records, marks = self._calls[guided].records(), self._marks[guided]
        if not records:
            return np.zeros(len(times)), np.zeros(len(times))
        order = np.argsort([record["t"] for record in records])
        known = np.array([record["t"] for record in records])[order]
        gflops = np.array([record["gflops"] for record in records])[order]
        seconds = np.array([Clock.milliseconds(*pair) / 1e3 / self.images for pair in marks])[order]
        return np.interp(times, known, gflops), np.interp(times, known, seconds)
