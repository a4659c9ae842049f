"""Figures as a line holds them: a median with its spread and the number of measurements."""

from collections.abc import Sequence
from statistics import median, quantiles
from typing import Any

from dcdit.profiling.reliability import Pair, doubts
from dcdit.profiling.rounds import Ratio, Rounds


def figure(values: Sequence[float]) -> dict[str, Any]:
    """The median, the quartiles and the number of some values."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": median(values), "low": low, "high": high, "n": len(values)}


def interval(ratio: Ratio) -> dict[str, float]:
    """A ratio and the ends of its interval (:class:`dcdit.profiling.rounds.Ratio`)."""
    return {"value": ratio.value, "low": ratio.low, "high": ratio.high}


def times(rounds: Rounds) -> dict[str, dict[str, Any]]:
    """Milliseconds of every call of the rounds."""
    return {name: figure(rounds.times(name)) for name in rounds.passes}


def warnings(rounds: Rounds, pairs: Sequence[Pair]) -> list[str]:
    """Why the ratios of these pairs cannot be relied on (:mod:`dcdit.profiling.reliability`)."""
    return doubts(rounds, pairs, {})
