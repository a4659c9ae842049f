"""Whether timings can be relied on, by thresholds that were fixed before anything was measured.

The interval of a ratio knows only how the rounds of one run scatter. So whatever was measured twice must also agree.
Two numbers that are each within the tolerance of the truth differ by at most twice the tolerance.

What no check can find is a disturbance that slows down one of two calls in every round: it looks like a slower call.
"""

from collections.abc import Collection, Iterator, Mapping

from dcdit.profiling.rounds import Rounds, disagreement, spread

TOLERANCE = 0.05
"""How far a ratio of times may be uncertain (:attr:`dcdit.profiling.rounds.Ratio.uncertainty`)."""
DISAGREEMENT = 2 * TOLERANCE
"""How far two measurements of one thing may differ, how far times may scatter, and how long threads may wait."""
NARROW = 0.02
"""Measuring stops before its time is used up once every ratio is as certain as this."""

Pair = tuple[str, str]
Finding = tuple[float, str]
"""A quantity over its threshold, and a sentence about it."""


def is_narrow(rounds: Rounds, pairs: Collection[Pair]) -> bool:
    """Whether the ratios of all these pairs are known well enough to stop."""
    return all(rounds.ratio(*pair).uncertainty <= NARROW for pair in pairs)


def is_crowded(rounds: Rounds) -> bool:
    """Whether other work takes so much of the machine that more rounds are of no use."""
    return rounds.waited is not None and rounds.waited > DISAGREEMENT


def doubts(rounds: Rounds, pairs: Collection[Pair], repeated: Mapping[str, str]) -> list[str]:
    """Why the ratios of these pairs cannot be relied on, the worst case of each kind; empty if they can.

    Args:
        rounds: what was measured.
        pairs: the calls whose ratios are wanted.
        repeated: call -> another call of the rounds that does the same.
    """
    kinds = (
        _waiting(rounds),
        _scatter(rounds),
        _halves(rounds),
        _repetitions(rounds, repeated),
        _fastest(rounds, pairs),
        _intervals(rounds, pairs),
    )
    worst = (max(findings, default=(0.0, "")) for findings in kinds)
    return [sentence for excess, sentence in worst if not excess <= 1]


def _waiting(rounds: Rounds) -> Iterator[Finding]:
    if rounds.waited is not None:
        text = f"threads waited for a processor {rounds.waited:.0%} of the time: other work runs on this machine"
        yield rounds.waited / DISAGREEMENT, text


def _scatter(rounds: Rounds) -> Iterator[Finding]:
    for call in rounds.passes:
        size = spread(rounds.times(call))
        yield size / DISAGREEMENT, f"the times of {call} scatter by ±{size:.0%} (half the interquartile range)"


def _halves(rounds: Rounds) -> Iterator[Finding]:
    for call in rounds.passes:
        first, second = rounds.halves(call)
        text = f"{call} took {first:.4g} ms in the first half of the rounds and {second:.4g} ms in the second"
        yield disagreement(first, second) / DISAGREEMENT, text


def _repetitions(rounds: Rounds, repeated: Mapping[str, str]) -> Iterator[Finding]:
    for call, again in repeated.items():
        ratio = rounds.ratio(again, call).value
        text = f"{again} took {ratio:.2f} times as long as {call}, which is the same work"
        yield disagreement(ratio, 1.0) / DISAGREEMENT, text


def _fastest(rounds: Rounds, pairs: Collection[Pair]) -> Iterator[Finding]:
    for above, below in pairs:
        typical, fastest = rounds.ratio(above, below).value, rounds.fastest_ratio(above, below)
        text = f"{above} over {below} is {typical:.2f} in the median round and {fastest:.2f} by the shortest times"
        yield disagreement(typical, fastest) / DISAGREEMENT, text


def _intervals(rounds: Rounds, pairs: Collection[Pair]) -> Iterator[Finding]:
    for above, below in pairs:
        size = rounds.ratio(above, below).uncertainty
        yield size / TOLERANCE, f"the time of {above} over that of {below} is known to ±{size:.0%} only"
