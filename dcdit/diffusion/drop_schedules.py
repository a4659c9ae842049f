"""Drop fractions that change while an image is drawn: rho(t), for ``drop_fraction=`` of :func:`dcdit.diffusion.sample`.

Time goes from data (0) to noise (1). Sampling starts at 1, so the first value of a schedule is the one at time 1.
"""

import bisect
import math
from collections.abc import Callable, Sequence
from itertools import pairwise

DropSchedule = Callable[[float], float]
"""From the time, 1 (noise) to 0 (data), to a drop fraction."""

FORMS = "constant:RHO, linear:FIRST:LAST, cosine:FIRST:LAST, steps:RHO,TIME=RHO,... (times descending)"


def constant(rho: float) -> DropSchedule:
    """The same rho throughout."""
    _check(rho)
    return lambda time: rho


def linear(first: float, last: float) -> DropSchedule:
    """From ``first`` at noise to ``last`` at data, evenly."""
    _check(first, last)
    return lambda time: last + (first - last) * time


def cosine(first: float, last: float) -> DropSchedule:
    """From ``first`` at noise to ``last`` at data along half a cosine: flat at both ends."""
    _check(first, last)
    return lambda time: last + (first - last) * (1 - math.cos(math.pi * time)) / 2


def steps(first: float, changes: Sequence[tuple[float, float]]) -> DropSchedule:
    """``first`` at noise, then a table of (time, rho): each rho holds from its time down to the next.

    Raises:
        ValueError: times that are not in (0, 1) or do not descend, or a rho outside [0, 1).
    """
    times = [time for time, _ in changes]
    if any(not 0 < time < 1 for time in times) or any(after >= before for before, after in pairwise(times)):
        raise ValueError(f"times of the drop schedule are {times}; accepted: numbers in (0, 1), descending")
    values = [first, *(rho for _, rho in changes)]
    _check(*values)
    # The index is the number of changes that sampling has passed: those whose time is at least `time`.
    ascending = times[::-1]
    return lambda time: values[len(times) - bisect.bisect_left(ascending, time)]


SHAPES: dict[str, tuple[Callable[..., DropSchedule], int]] = {
    "constant": (constant, 1),
    "linear": (linear, 2),
    "cosine": (cosine, 2),
    "steps": (steps, 2),
}
"""Name -> (function, number of its arguments)."""


def parse_drop_schedule(text: str) -> DropSchedule:
    """A schedule from its name and numbers, e.g. ``linear:0.6:0.1`` or ``steps:0.6,0.5=0.3,0.2=0``.

    Raises:
        ValueError: another form, or numbers that the schedule does not accept.

    Example:
        >>> from dcdit.diffusion import parse_drop_schedule
        >>> linear, steps = parse_drop_schedule("linear:0.6:0.1"), parse_drop_schedule("steps:0.6,0.5=0.3,0.2=0")
        >>> [round(linear(time), 3) for time in (1.0, 0.5, 0.0)]  # from noise to data
        [0.6, 0.35, 0.1]
        >>> [steps(time) for time in (1.0, 0.5, 0.2)]
        [0.6, 0.3, 0.0]
    """
    shape, *parts = text.split(":")
    arguments: Sequence[object] = ()
    try:
        build, count = SHAPES[shape]
        if shape == "steps":
            first, *changes = ":".join(parts).split(",")
            pairs = [change.split("=") for change in changes]
            arguments = float(first), [(float(time), float(rho)) for time, rho in pairs]
        else:
            arguments = [float(part) for part in parts]
        if len(arguments) != count:
            raise ValueError
    except (KeyError, ValueError):
        raise ValueError(f"drop schedule {text!r}; accepted: {FORMS}") from None
    return build(*arguments)


def _check(*values: float) -> None:
    for rho in values:
        if not 0 <= rho < 1:
            raise ValueError(f"the drop schedule holds {rho:g}; accepted: numbers in [0, 1)")
