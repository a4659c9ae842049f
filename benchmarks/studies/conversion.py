"""Do saved FLOPs become time? Forward passes of several models, timed in turns, and their eta.

Beside the time on the clock stands the processor time of the thread, which does not grow when other work takes its
turn.
"""

import time
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dcdit.profiling.rounds import Rounds, spread
from dcdit.profiling.timing import time_rounds
from dcdit.sample.model_calls import ModelCalls
from dcdit.utils.environment import cpu_name
from dcdit.utils.tables import markdown_table

HEAD = ["", "GFLOPs/image", "least ms", "processor ms", "spread", "eta, processor time", "eta, clock (95 %)"]


class Side:
    """Forward passes of a model on the same images. ``seconds`` holds the processor time of each call.

    Args:
        model: a model, or what is called like one.
        y: (B,) labels.
        passes: (x, t) of each pass of a call, all images at one timestep.
        gflops: per image and pass. None counts them; what is left out in drawing is left out, also where it is masked.
    """

    def __init__(
        self, model: Any, y: Tensor, passes: Sequence[tuple[Tensor, float]], gflops: float | None = None
    ) -> None:
        self.seconds: list[float] = []
        self._model = model
        self._passes = [(x, torch.full(y.shape, t, device=y.device), y) for x, t in passes]
        self.gflops = self._count(len(y)) if gflops is None else gflops

    def __call__(self) -> None:
        began = time.process_time()
        for inputs in self._passes:
            self._model(*inputs)
        self.seconds.append(time.process_time() - began)

    def _count(self, images: int) -> float:
        calls = ModelCalls(self._model, images)
        for inputs in self._passes:
            calls(*inputs)
        return fmean(record["gflops"] for record in calls.records())


class SideTime(NamedTuple):
    """What was measured of a side. eta compares with the first side, which has eta 1."""

    gflops: float
    """Per image and pass."""
    least_ms: float
    """Of a call, on the clock."""
    processor_ms: float
    """Of a call, the median."""
    spread: float
    """Of the processor time (:func:`dcdit.profiling.rounds.spread`)."""
    eta: float
    """By processor time, the median of the rounds."""
    clock_eta: tuple[float, float, float]
    """By the clock: the median of the rounds and the ends of its interval."""


class SideTimes(NamedTuple):
    sides: dict[str, SideTime]
    conditions: str
    """A sentence."""


def measure_sides(
    sides: Mapping[str, Side], rounds: int, device: torch.device | None = None, seconds: float = 0
) -> SideTimes:
    """Time all sides in turns, ``rounds`` times at least and so many seconds."""
    measured = time_rounds(sides, device or torch.device("cpu"), seconds, warmup=1, least=rounds)
    waited = "an unknown part" if measured.waited is None else f"{measured.waited:.0%}"
    sentence = f"{len(measured)} rounds in turns. Threads waited for a processor {waited} of the time."
    return SideTimes({label: _side_time(label, sides, measured) for label in sides}, sentence)


def time_sides(sides: Mapping[str, Side], rounds: int) -> str:
    """Time all sides in turns. Returns a table, in which eta compares with the first side, and its conditions."""
    return side_table(measure_sides(sides, rounds))


def side_table(found: SideTimes) -> str:
    """What :func:`time_sides` returns."""
    rows = [_row(label, side, first=not number) for number, (label, side) in enumerate(found.sides.items())]
    return f"{markdown_table(HEAD, rows)}\n\n{found.conditions}"


def _side_time(label: str, sides: Mapping[str, Side], measured: Rounds) -> SideTime:
    baseline = next(iter(sides))
    side, first = sides[label], sides[baseline]
    # The first call of each is a warm-up.
    own, theirs = side.seconds[1:], first.seconds[1:]
    share = side.gflops / first.gflops
    clock = measured.ratio(baseline, label).scaled(share)
    eta = median(a / b for a, b in zip(theirs, own, strict=True)) * share
    times = min(measured.times(label)), 1e3 * median(own), spread(own)
    return SideTime(side.gflops, *times, eta, (clock.value, clock.low, clock.high))


def _row(label: str, side: SideTime, first: bool) -> list[str]:
    cells = [label, f"{side.gflops:.2f}", f"{side.least_ms:.0f}", f"{side.processor_ms:.0f}", f"±{side.spread:.1%}"]
    if first:
        return [*cells, "", ""]
    middle, low, high = side.clock_eta
    return [*cells, f"{side.eta:.2f}", f"{middle:.2f} ({low:.2f} to {high:.2f})"]


def difference(one: Any, other: Any, x: Tensor, t: float, y: Tensor) -> float:
    """The largest difference of the outputs of two models, over the largest output of the second."""
    expected = other(x, torch.full(y.shape, t), y)
    return float((one(x, torch.full(y.shape, t), y) - expected).abs().max() / expected.abs().max())


def fill_zero_weights(model: nn.Module) -> None:
    """With random numbers: the zeros of a new model would hide whole branches."""
    for weight in model.parameters():
        if not weight.any():
            nn.init.normal_(weight, std=0.02)


def conditions(command: str, baseline: str) -> str:
    """How it was measured.

    Args:
        baseline: what eta compares with, as in "time ``baseline``".
    """
    return (
        f"`{command}` on {cpu_name()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, float32, random "
        f"weights. eta = (time {baseline} / time) / (FLOPs {baseline} / FLOPs), the median of the rounds: 1 means that "
        "every saved FLOP became time. Processor time does not count the turns of other work; its spread is half the "
        "interquartile range over the median."
    )
