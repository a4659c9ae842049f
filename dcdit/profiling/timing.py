"""Wall-clock time, told fairly: all sides in one run, taking turns, medians; stages inside whole forward passes."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import TypeAlias

import torch

from dcdit.nn.stages import collect_stages

Work = Callable[[], object]
Mark: TypeAlias = "torch.cuda.Event | float"
FLUSH_BYTES = 1 << 28
"""More than any L2 cache holds."""


class Clock:
    """Marks points in time on a device: events on a GPU (no sync until they are read), the host clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Mark:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @staticmethod
    def milliseconds(start: Mark, end: Mark) -> float:
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

    Raises:
        ValueError: no sides, or least below 1.
    """
    if not sides or least < 1:
        raise ValueError(f"{len(sides)} sides and least={least} rounds; accepted: at least one of each")
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
    """Milliseconds of each stage of a forward pass (see :mod:`dcdit.nn.stages`), and of the ``whole``.

    All of one pass, the median one by its whole time, so that the stages add up to it but for what no stage covers.

    Raises:
        ValueError: repeats below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; accepted: at least 1")
    clock = Clock(device)
    passes: list[dict[str, float]] = []
    for _ in range(repeats):
        marks: list[tuple[str, Mark, Mark]] = []

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
            spent[name] = spent.get(name, 0.0) + clock.milliseconds(start, stop)
        passes.append(spent)
    return sorted(passes, key=lambda spent: spent["whole"])[repeats // 2]


def time_kernels(work: Work, device: torch.device, repeats: int = 30) -> float | None:
    """Median milliseconds of a call by device events, with the L2 cache flushed before each; None without a GPU."""
    if device.type != "cuda":
        return None
    clock = Clock(device)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    marks = []
    for _ in range(repeats):
        flush.zero_()  # also keeps the device busy, so that the host runs ahead and its own time does not show
        start = clock.mark()
        work()
        marks.append((start, clock.mark()))
    return median(clock.milliseconds(start, end) for start, end in marks)


def time_graph(work: Work, device: torch.device, calls: int = 20, repeats: int = 10) -> float | None:
    """Median milliseconds of a call replayed inside a CUDA graph of many, where launches cost least.

    None without a GPU, or for work that a graph cannot hold because it reads on the host.
    """
    if device.type != "cuda":
        return None
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                work()
    except RuntimeError:  # what capture raises for a synchronisation
        return None
    clock = Clock(device)
    samples = []
    for _ in range(repeats):
        start = clock.mark()
        graph.replay()
        samples.append(clock.milliseconds(start, clock.mark()) / calls)
    return median(samples)


def copy_bandwidth(device: torch.device, size: int = 1 << 28) -> float:
    """GB/s of a large copy, each byte read once and written once: what a memory-bound kernel can reach at best.

    Args:
        device: whose memory.
        size: bytes to copy.
    """
    source = torch.zeros(size, dtype=torch.int8, device=device)
    target = torch.zeros_like(source)
    ms = time_sides({"copy": lambda: target.copy_(source)}, device, seconds=0.5)["copy"]
    return 2 * size / ms / 1e6
