"""Statistics of calls that were timed in turns: how far their times scatter, and what their ratio is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles

WHOLE = "whole"
"""The name under which a pass holds the time of the whole call, beside those of its stages."""


def spread(values: Sequence[float]) -> float:
    """Half the interquartile range over the median. A quarter of the values lie further off on either side."""
    if len(values) < 2:
        return math.nan
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / middle if middle else 0.0


def disagreement(a: float, b: float) -> float:
    """By which fraction the larger of two times exceeds the smaller."""
    return max(a, b) / min(a, b) - 1


@dataclass(frozen=True)
class Ratio:
    """Time of one call over that of another."""

    value: float
    """Median of the ratios of each round. What slows a round down slows both calls, so it is not in the ratio."""
    low: float
    high: float
    """Ends of the interval that holds the true median with a probability of at least 95 %, from 6 rounds on."""

    @property
    def uncertainty(self) -> float:
        """Half the interval over the value."""
        return (self.high - self.low) / 2 / self.value

    def scaled(self, factor: float) -> "Ratio":
        return Ratio(self.value * factor, self.low * factor, self.high * factor)


@dataclass
class Rounds:
    """What was measured: one pass of each call per round."""

    passes: dict[str, list[dict[str, float]]]
    """Call -> for each round, the milliseconds of the ``whole`` and of the stages, where those were timed."""
    seconds: float = 0.0
    """How long all of it took."""
    waited: float | None = None
    """Fraction of the time that threads waited for a processor (:mod:`dcdit.profiling.load`); None is: not known."""

    def __len__(self) -> int:
        return min(len(passes) for passes in self.passes.values())

    def times(self, call: str) -> list[float]:
        """Milliseconds of the whole call, in the order of the rounds."""
        return [measured[WHOLE] for measured in self.passes[call]]

    def stage_times(self, call: str) -> dict[str, list[float]]:
        """The same of the whole and of every stage that was timed."""
        return {stage: [measured[stage] for measured in self.passes[call]] for stage in self.passes[call][0]}

    def ratio(self, above: str, below: str) -> Ratio:
        """The first call's time over the second's, with the interval that the order statistics of the rounds give."""
        ratios = sorted(a / b for a, b in zip(self.times(above), self.times(below), strict=True))
        outside = max(0, math.floor((len(ratios) - 1 - 1.96 * math.sqrt(len(ratios))) / 2))
        return Ratio(median(ratios), ratios[outside], ratios[-1 - outside])

    def fastest_ratio(self, above: str, below: str) -> float:
        """The ratio of the shortest times. What disturbs a call only adds to its time, so these are disturbed least."""
        return min(self.times(above)) / min(self.times(below))

    def halves(self, call: str) -> tuple[float, float]:
        """Median milliseconds in the first and in the second half of the rounds."""
        times = self.times(call)
        return median(times[: len(times) // 2]), median(times[len(times) // 2 :])
