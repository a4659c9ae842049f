"""Wall-clock time, told fairly: all sides in one run, taking turns, medians; stages timed inside whole forward passes."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median

import torch

from dcdit.nn.stages import collect_stages

Work = Callable[[], object]


class Clock:
    """Marks points in time on a device: events on a GPU (no sync until they are read), the host clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> "torch.cuda.Event | float":
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @staticmethod
    def milliseconds(start: "torch.cuda.Event | float", end: "torch.cuda.Event | float") -> float:
        """Time between two marks; waits for a GPU to reach the second."""
        if isinstance(start, float) or isinstance(end, float):
            assert isinstance(start, float) and isinstance(end, float)
            return 1e3 * (end - start)
        end.synchronize()
        return start.elapsed_time(end)


def time_sides(
    sides: Mapping[str, Work], device: torch.device, seconds: float = 2.0, warmup: int = 2, least: int = 5
) -> dict[str, float]:
    """Median milliseconds per call of each side.

    The sides take turns, each starting a round in turn, so that a slow moment of the machine hits all of them.

    Args:
        sides: name -> work to time.
        device: where the work runs.
        seconds: how long to go on per side.
        warmup: calls per side that are not counted.
        least: rounds at the very least.
    """
    clock = Clock(device)
    for work in sides.values():
        for _ in range(warmup):
            work()
    samples: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    stop = time.perf_counter() + seconds * len(sides)
    while len(samples[names[-1]]) < least or time.perf_counter() < stop:
        for name in names:
            start = clock.mark()
            sides[name]()
            samples[name].append(clock.milliseconds(start, clock.mark()))
        names.append(names.pop(0))
    return {name: median(values) for name, values in samples.items()}


def time_stages(forward: Work, device: torch.device, repeats: int = 5) -> dict[str, float]:
    """Median milliseconds of each stage of a forward pass (see :mod:`dcdit.nn.stages`), and of the ``whole``."""
    clock = Clock(device)
    passes: list[dict[str, float]] = []
    for _ in range(repeats):
        marks: list[tuple[str, object, object]] = []

        @contextmanager
        def collector(name: str, marks: list = marks) -> Iterator[None]:
            start = clock.mark()
            yield
            marks.append((name, start, clock.mark()))

        begin = clock.mark()
        with collect_stages(collector):
            forward()
        end = clock.mark()
        spent = {"whole": clock.milliseconds(begin, end)}
        for name, start, stop in marks:
            spent[name] = spent.get(name, 0.0) + clock.milliseconds(start, stop)  # type: ignore[arg-type]
        passes.append(spent)
    return {name: median(spent[name] for spent in passes) for name in passes[0]}
