"""Timing helpers on a clock of our own, and the sum of stages on a real model."""

import time
from statistics import median

import pytest
import torch

from dcdit.models import DCDiT, DCDiTConfig
from dcdit.nn import STAGES, stage
from dcdit.profiling import timing
from dcdit.profiling.rounds import Rounds
from dcdit.profiling.timing import time_rounds, time_stages

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the host clock shows; a timed call moves it on."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return now


def spend(clock: list[float], seconds: float) -> None:
    clock[0] += seconds


def test_calls_take_turns_and_medians_count(clock: list[float]) -> None:
    order: list[str] = []

    def call(name: str, seconds: list[float]) -> None:
        order.append(name)
        spend(clock, seconds[order.count(name) % len(seconds)])

    slow = [1.0, 1.0, 100.0]  # one outlier in three
    rounds = time_rounds(
        {"a": lambda: call("a", [0.5]), "b": lambda: call("b", slow)}, CPU, seconds=0.0, warmup=1, least=9
    )
    assert (median(rounds.times("a")), median(rounds.times("b"))) == (500.0, 1000.0)
    counted = order[2:]
    assert counted[:4] == ["a", "b", "b", "a"]
    assert counted.count("a") == counted.count("b") == 9


def test_seconds_are_spent(clock: list[float]) -> None:
    calls: list[int] = []
    time_rounds({"a": lambda: (calls.append(1), spend(clock, 0.1))}, CPU, seconds=3.0, warmup=0, least=1)
    assert len(calls) == pytest.approx(30, abs=1)


@pytest.mark.parametrize(("variants", "least"), [({}, 5), ({"a": lambda: None}, 0)])
def test_nothing_to_time_is_refused(variants: dict, least: int) -> None:
    with pytest.raises(ValueError, match="accepted: at least one of each"):
        time_rounds(variants, CPU, 0.0, least=least)


def test_rounds_hold_one_time_of_each_call_in_order(clock: list[float]) -> None:
    a, b = iter([9.0, 1.0, 2.0, 3.0]), iter([9.0, 4.0, 5.0, 6.0])
    calls = {"a": lambda: spend(clock, next(a)), "b": lambda: spend(clock, next(b))}
    rounds = time_rounds(calls, CPU, 0.0, warmup=1, least=3)
    assert rounds.times("a") == pytest.approx([1e3, 2e3, 3e3])
    assert rounds.times("b") == pytest.approx([4e3, 5e3, 6e3])
    assert rounds.seconds == pytest.approx(1 + 2 + 3 + 4 + 5 + 6)


def test_stages_are_timed_in_the_same_rounds(clock: list[float]) -> None:
    def forward() -> None:
        with stage("encoder"):
            spend(clock, 0.3)
        with stage("decoder"):
            spend(clock, 0.2)

    rounds = time_rounds({"plain": forward, "by stage": forward}, CPU, 0.0, staged={"by stage"}, least=4)
    assert set(rounds.stage_times("plain")) == {"whole"}
    stages = rounds.stage_times("by stage")
    assert {name: len(times) for name, times in stages.items()} == {"whole": 4, "encoder": 4, "decoder": 4}
    assert stages["encoder"] == pytest.approx([300.0] * 4)
    assert stages["whole"] == pytest.approx([500.0] * 4)


def test_enough_ends_the_rounds_before_their_time(clock: list[float]) -> None:
    seen: list[int] = []

    def enough(rounds: Rounds) -> bool:
        seen.append(len(rounds))
        return len(rounds) >= 30

    rounds = time_rounds({"a": lambda: spend(clock, 0.1)}, CPU, 100.0, least=50, enough=enough)
    assert seen[0] == 3
    assert len(rounds) == seen[-1] < 35
    assert len(seen) < 25  # not after each round: the judgement sorts all of them
    assert rounds.seconds == pytest.approx(0.1 * len(rounds))


def test_the_time_ends_the_rounds_otherwise(clock: list[float]) -> None:
    rounds = time_rounds({"a": lambda: spend(clock, 0.1)}, CPU, 5.0, enough=lambda _: False)
    assert len(rounds) == pytest.approx(50, abs=1)


def test_stages_come_from_the_median_pass(clock: list[float]) -> None:
    passes = iter([1.0, 9.0, 5.0])

    def forward() -> None:
        seconds = next(passes)
        with stage("encoder"):
            spend(clock, 0.6 * seconds)
        with stage("encoder"):
            spend(clock, 0.1 * seconds)
        with stage("decoder"):
            spend(clock, 0.3 * seconds)

    found = time_stages(forward, CPU, repeats=3)
    assert found.ms == pytest.approx({"whole": 5000.0, "encoder": 3500.0, "decoder": 1500.0})
    # Half the interquartile range of 1, 5 and 9 over their median: every stage scatters as the whole does.
    assert found.spread == pytest.approx(dict.fromkeys(found.ms, (7 - 3) / 2 / 5))


def test_no_repeats_are_refused() -> None:
    with pytest.raises(ValueError, match="repeats is 0"):
        time_stages(lambda: None, CPU, repeats=0)


@pytest.mark.perf
def test_stages_sum_to_the_whole() -> None:
    """Within 3 % on some pass: time that a busy machine takes between two stages belongs to none of them."""
    torch.manual_seed(0)
    model = DCDiT(DCDiTConfig(grid=(32, 32), hidden_size=256, depth=4, num_heads=4, num_classes=10)).eval()
    x, t, y = torch.randn(4, 4, 32, 32), torch.arange(4), torch.arange(4)

    def covered() -> float:
        with torch.inference_mode():
            found = time_stages(lambda: model(x, t, y), CPU, repeats=3).ms
        assert set(found) == {*STAGES, "whole"}
        return sum(found[name] for name in STAGES) / found["whole"]

    assert any(0.97 <= covered() <= 1.0 for _ in range(5))


def test_clock_on_the_host() -> None:
    clock = timing.Clock(CPU)
    start = clock.mark()
    time.sleep(0.002)
    assert clock.milliseconds(start, clock.mark()) >= 2.0
