"""Wall-clock time, compared fairly: of calls that run in turns. Also the stages of a forward pass."""

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import NamedTuple, TypeAlias

import torch

from dcdit.nn.stages import collect_stages
from dcdit.profiling.load import ProcessorWait
from dcdit.profiling.rounds import WHOLE, Rounds, spread

Call = Callable[[], object]
"""What is timed: a function without arguments, whose result does not matter."""
Mark: TypeAlias = "torch.cuda.Event | float"


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


def time_rounds(
    calls: Mapping[str, Call],
    device: torch.device,
    seconds: float,
    *,
    staged: Collection[str] = (),
    warmup: int = 2,
    least: int = 5,
    enough: Callable[[Rounds], bool] | None = None,
) -> Rounds:
    """Time calls in turns.

    Each round calls each of them once and starts with another one. So a slow moment of the machine hits all of them.

    Args:
        calls: name -> function to time.
        device: where they run.
        seconds: how long to go on.
        staged: the calls whose stages (see :mod:`dcdit.nn.stages`) are timed too.
        warmup: calls of each that are not counted.
        least: rounds at least, however long they take.
        enough: whether to stop, before the seconds are over or before there are so many rounds. It is asked from 3
            rounds on, and again whenever there are a tenth more.

    Raises:
        ValueError: no calls, or least below 1.
    """
    if not calls or least < 1:
        raise ValueError(f"{len(calls)} variants and least={least} rounds; accepted: at least one of each")
    clock = Clock(device)
    for call in calls.values():
        for _ in range(warmup):
            call()
    rounds, names, next_look = Rounds({name: [] for name in calls}), list(calls), 3
    began, wait = time.perf_counter(), ProcessorWait()
    while len(rounds) < least or rounds.seconds < seconds:
        for name in names:
            rounds.passes[name].append(_time_pass(calls[name], clock, name in staged))
        names.append(names.pop(0))
        rounds.seconds = time.perf_counter() - began
        if enough is not None and len(rounds) >= next_look:
            rounds.waited = wait.share()
            if enough(rounds):
                return rounds
            next_look = math.ceil(1.1 * len(rounds))
    rounds.waited = wait.share()
    return rounds


def _time_pass(call: Call, clock: Clock, staged: bool) -> dict[str, float]:
    """Milliseconds of the whole call and, if wanted, of its stages."""
    marks: list[tuple[str, Mark, Mark]] = []

    @contextmanager
    def collector(name: str) -> Iterator[None]:
        start = clock.mark()
        yield
        marks.append((name, start, clock.mark()))

    with collect_stages(collector) if staged else nullcontext():
        begin = clock.mark()
        call()
        end = clock.mark()
    spent = {WHOLE: clock.milliseconds(begin, end)}
    for name, start, stop in marks:
        spent[name] = spent.get(name, 0.0) + clock.milliseconds(start, stop)
    return spent


class StageTimes(NamedTuple):
    """Milliseconds by stage, and of the ``whole``."""

    ms: dict[str, float]
    """Of one pass, so the stages add up to the whole, except for what no stage covers."""
    spread: dict[str, float]
    """Over all passes (:func:`dcdit.profiling.rounds.spread`)."""


def time_stages(forward: Call, device: torch.device, repeats: int = 5) -> StageTimes:
    """Time each stage of a forward pass (see :mod:`dcdit.nn.stages`): in the pass with the median whole time.

    Raises:
        ValueError: repeats below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; accepted: at least 1")
    clock = Clock(device)
    passes = [_time_pass(forward, clock, staged=True) for _ in range(repeats)]
    middle = sorted(passes, key=lambda spent: spent[WHOLE])[repeats // 2]
    return StageTimes(middle, {stage: spread([spent.get(stage, 0.0) for spent in passes]) for stage in middle})
