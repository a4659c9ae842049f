"""Do saved FLOPs become time? Forward passes of several models, timed in turns on a CPU, and their eta.

Beside the time on the clock stands the processor time of the thread, which does not grow when other work takes its
turn.
"""

import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from dcdit.profiling.rounds import Rounds, spread
from dcdit.profiling.timing import time_rounds
from dcdit.sample.model_calls import ModelCalls
from dcdit.utils.environment import cpu_name
from dcdit.utils.tables import markdown_table

HEAD = ["", "GFLOPs/image", "least ms", "processor ms", "spread", "eta, processor time", "eta, clock (95 %)"]


class Side:
    """Forward passes of a model at one timestep. ``seconds`` holds the processor time of each."""

    def __init__(self, model: Any, x: Tensor, y: Tensor, t: float) -> None:
        self.seconds: list[float] = []
        self._model, self._inputs = model, (x, torch.full(y.shape, t), y)
        calls = ModelCalls(model, len(y))
        calls(*self._inputs)
        self.gflops = calls.records()[0]["gflops"]
        """Per image. What is left out in drawing is left out, also where the model masks it."""

    def __call__(self) -> None:
        began = time.process_time()
        self._model(*self._inputs)
        self.seconds.append(time.process_time() - began)


def time_sides(sides: Mapping[str, Side], rounds: int) -> str:
    """Time all sides in turns. Returns a table, in which eta compares with the first side, and its conditions."""
    measured = time_rounds(sides, torch.device("cpu"), 0, warmup=1, least=rounds)
    table = markdown_table(HEAD, [_row(label, sides, measured) for label in sides])
    waited = "an unknown part" if measured.waited is None else f"{measured.waited:.0%}"
    return f"{table}\n\n{len(measured)} rounds in turns. Threads waited for a processor {waited} of the time."


def _row(label: str, sides: Mapping[str, Side], measured: Rounds) -> list[str]:
    baseline = next(iter(sides))
    side, first = sides[label], sides[baseline]
    # The first call of each is a warm-up.
    own, theirs = side.seconds[1:], first.seconds[1:]
    cells = [label, f"{side.gflops:.2f}", f"{min(measured.times(label)):.0f}", f"{1e3 * median(own):.0f}"]
    cells.append(f"±{spread(own):.1%}")
    if side is first:
        return [*cells, "", ""]
    saved = side.gflops / first.gflops
    clock = measured.ratio(baseline, label).scaled(saved)
    processor = median(a / b for a, b in zip(theirs, own, strict=True)) * saved
    return [*cells, f"{processor:.2f}", f"{clock.value:.2f} ({clock.low:.2f} to {clock.high:.2f})"]


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
