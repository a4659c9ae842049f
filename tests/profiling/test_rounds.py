"""Spread, paired ratios and their intervals."""

import math
from statistics import median

import pytest

from dcdit.profiling.rounds import Ratio, Rounds, disagreement, spread


def rounds(**times: list[float]) -> Rounds:
    return Rounds({call: [{"whole": ms} for ms in values] for call, values in times.items()})


def test_spread_is_half_the_interquartile_range_over_the_median() -> None:
    assert spread([1, 2, 3, 4, 5]) == pytest.approx((4 - 2) / 2 / 3)
    assert spread([5, 1, 4, 1000, 3]) == pytest.approx((5 - 3) / 2 / 4)
    assert spread([7.0] * 5) == 0


def test_a_single_value_has_no_spread() -> None:
    assert math.isnan(spread([3.0]))


def test_a_stage_without_time_does_not_scatter() -> None:
    assert spread([0.0, 0.0, 0.0, 1.0]) == 0


@pytest.mark.parametrize(("a", "b"), [(3.0, 2.0), (2.0, 3.0)])
def test_disagreement_has_no_direction(a: float, b: float) -> None:
    assert disagreement(a, b) == pytest.approx(0.5)


def test_a_machine_that_gets_slower_does_not_change_a_ratio() -> None:
    slower = [1.0 + 0.2 * i for i in range(20)]
    measured = rounds(a=[30 * s for s in slower], b=[20 * s for s in slower])
    ratio = measured.ratio("a", "b")
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((1.5, 1.5, 1.5))
    assert ratio.uncertainty == pytest.approx(0)
    first, second = measured.halves("a")
    assert first == pytest.approx(30 * median(slower[:10]))
    assert second == pytest.approx(30 * median(slower[10:]))


def test_outliers_of_either_side_do_not_change_a_ratio() -> None:
    measured = rounds(a=[30.0, 300.0, 30.0, 30.0, 30.0, 30.0, 30.0, 30.0, 30.0], b=[20.0] * 8 + [90.0])
    ratio = measured.ratio("a", "b")
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((1.5, 1.5, 1.5))
    assert measured.fastest_ratio("a", "b") == pytest.approx(1.5)


def test_a_ratio_of_flops_scales_the_interval_too() -> None:
    scaled = Ratio(2.0, 1.5, 3.0).scaled(0.5)
    assert scaled == Ratio(1.0, 0.75, 1.5)
    assert scaled.uncertainty == pytest.approx(0.375)


@pytest.mark.parametrize("count", [*range(6, 60), 100, 333, 1000])
def test_the_interval_holds_the_median_with_95_percent(count: int) -> None:
    """Of n values, those of rank k and n + 1 - k enclose the median unless fewer than k lie on one side of it."""
    ratio = rounds(a=[float(i) for i in range(1, count + 1)], b=[1.0] * count).ratio("a", "b")
    assert ratio.low + ratio.high == count + 1
    rank = int(ratio.low)

    def outside(rank: int) -> float:
        return 2 * sum(math.comb(count, i) for i in range(rank)) / 2**count

    assert outside(rank) <= 0.05
    assert count < 20 or outside(rank + 2) > 0.05  # and is not much wider than that


def test_stage_times_keep_their_rounds() -> None:
    passes = [{"whole": 3.0, "encoder": 1.0}, {"whole": 5.0, "encoder": 2.0}]
    measured = Rounds({"a": passes})
    assert measured.stage_times("a") == {"whole": [3.0, 5.0], "encoder": [1.0, 2.0]}
    assert measured.times("a") == [3.0, 5.0]
    assert len(measured) == 2
