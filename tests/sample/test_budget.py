"""Choosing a drop fraction from measured costs."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.small import small_dc_dit

from dcdit.diffusion import sample
from dcdit.sample import Guidance, budget
from dcdit.sample.budget import CostTable, measure_costs, seconds_from_profile
from dcdit.sample.model_calls import ModelCalls, call_times, tflops_per_image


def table(*costs):
    return CostTable("seconds", "here", [0.0, 0.3, 0.6, 0.9][: len(costs)], list(costs))


@pytest.mark.parametrize(
    ("target", "rho", "expected"),
    [(10, 0, 10), (9, 0.15, 9), (8, 0.3, 8), (5, 0.75, 5), (4, 0.9, 4), (11, 0, 10), (float("inf"), 0, 10)],
)
def test_choice_is_the_inverse_of_the_table(target, rho, expected):
    assert table(10, 8, 6, 4).choose(target) == pytest.approx((rho, expected))


def test_a_cost_that_rises_is_noise():
    """Dropping more cannot cost more: the cost at 0.6 counts as 5, like that at 0.3."""
    noisy = table(10, 5, 6, 4)
    rho, expected = noisy.choose(7.5)
    assert (rho, expected) == pytest.approx((0.15, 7.5))
    assert 0.6 <= noisy.choose(4.5)[0] <= 0.9


@pytest.mark.parametrize("target", [3.9, 0, -1, float("nan")])
def test_out_of_reach(target):
    message = r"seconds per image; reachable: 4 \(drop fraction 0.9\) to 10 \(drop fraction 0\)"
    with pytest.raises(ValueError, match=message):
        table(10, 8, 6, 4).choose(target)


def test_call_times_are_those_of_the_sampler():
    seen = []

    def model(x, t, y):
        seen.append(float(t[0]))
        return torch.zeros_like(x)

    for method, calls in (("ddpm", 5), ("euler", 5), ("heun", 10)):
        seen.clear()
        sample(model, torch.tensor([0]), 5, method, shape=(2, 3, 3), progress=False)
        assert call_times(method, 5) == seen and len(seen) == calls


@pytest.mark.parametrize("interval", [None, (0.25, 0.7), (0.2, 0.2)])
def test_a_pilot_of_the_same_length_counts_what_the_run_takes(interval):
    """A pilot with all the steps interpolates nothing over time, with any guidance interval."""
    model, labels = small_dc_dit(grid=(8, 8)), torch.tensor([1, 2])
    guidance = Guidance(2.0, interval, null_drop_fraction=0.5)
    tflops, seconds = measure_costs(model, labels, 8, "ddim", guidance, progress=False)
    for rho, cost in zip(tflops.drop_fractions, tflops.costs, strict=True):
        calls = ModelCalls(model, 2)
        options = {"cfg_scale": 2.0, "cfg_interval": interval, "progress": False}
        sample(calls, labels, 8, "ddim", drop_fraction=(rho, 0.5), **options)
        assert tflops_per_image(calls.records()) == pytest.approx(cost, rel=1e-9)
    assert all(cost > 0 for cost in seconds.costs)


def test_a_profile_of_an_earlier_version_is_read(monkeypatch):
    """The profiles under benchmarks/results call the variants sides."""
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "profile-dc-dit-s-256-batch-8" / "profile.json"
    monkeypatch.setattr(budget.torch, "get_num_threads", lambda: 2)
    table = seconds_from_profile(path, [900.0, 100.0], Guidance(2.0, (0.5, 1.0)), "cpu", "float32")
    assert table.drop_fractions == [0.0, 0.2, 0.4, 0.6]
    # Two calls, the first of them with both branches of guidance: three rows of 833.8 ms / 8.
    assert table.costs[0] == pytest.approx(3 * 0.8338417959985236 / 8)


@pytest.fixture
def pilot(monkeypatch):
    """The seconds table of a pilot whose call n of run r at drop fraction rho takes seconds(r, rho, n)."""

    def pilot(seconds: Callable[[int, float, int], float], **guidance):
        now, runs = [0.0], []

        class Clock:
            milliseconds = staticmethod(lambda start, end: 1e3 * (end - start))

            def __init__(self, device):
                self.marks = 0

            def mark(self):
                if self.marks:
                    now[0] += seconds(len(runs) - 2, *runs[-1])  # after a first run, which is not counted
                    runs[-1][1] += 1
                self.marks += 1
                return now[0]

        class Pilot(budget._Pilot):
            def __init__(self, model, images, rho, guidance):
                super().__init__(model, images, rho, guidance)
                runs.append([rho, 0])

        monkeypatch.setattr(budget, "Clock", Clock)
        monkeypatch.setattr(budget, "_Pilot", Pilot)
        model, labels = small_dc_dit(grid=(8, 8)), torch.tensor([1, 2])
        return measure_costs(model, labels, 16, "euler", Guidance(**{"scale": 1.0} | guidance), progress=False)[1]

    return pilot


def test_a_quiet_pilot_warns_of_nothing(pilot):
    """Calls that get faster as the router keeps less are no noise."""
    table = pilot(lambda run, rho, n: 0.1 * (1 - rho / 2) * 0.999**n)
    assert table.spread == pytest.approx(0, abs=1e-3)
    assert table.warnings == []


@pytest.mark.parametrize("guidance", [{}, {"scale": 2.0, "interval": (0.3, 0.6)}])
def test_a_noisy_pilot_warns(pilot, guidance):
    source = random.Random(0)
    table = pilot(lambda *_: source.uniform(0.05, 0.3), **guidance)
    assert table.spread > 0.2
    assert table.warnings[0].startswith("the times of the pilot's calls scatter by ±")


def test_larger_fractions_that_take_longer_are_said(pilot):
    """Dropping more cannot cost more; choose() replaces such a cost, and the table says that it was there."""
    table = pilot(lambda run, rho, n: 0.1 + 0.05 * (rho > 0.5))
    assert table.warnings == ["the pilot took 0.8 s at drop fraction 0.3 and 1.2 s at 0.6"]


def test_a_machine_that_becomes_slower_is_so_for_all_fractions(pilot):
    """The costs keep their ratios, because the fractions are gone through there and back, and the drift is said."""
    table = pilot(lambda run, rho, n: 0.1 * (1 - rho / 2) * (1 + 0.1 * run))
    assert [cost / table.costs[0] for cost in table.costs] == pytest.approx([1, 0.85, 0.7, 0.55])
    assert table.warnings == ["the pilot took 0.8 s at drop fraction 0 the first time and 1.36 s the second"]


@pytest.mark.parametrize(("reliable", "warned"), [({}, 0), ({"reliable": True}, 0), ({"reliable": False}, 1)])
def test_an_unreliable_profile_is_read_with_a_warning(reliable, warned, tmp_path):
    variants = [{"drop_fraction": rho, "ms": 80.0 * (1 - rho), "spread": 0.4 * rho} for rho in (0.0, 0.5)]
    conditions = {"device": "cpu", "dtype": "float32", "threads": torch.get_num_threads(), "batch": 8}
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({**conditions, "variants": variants, "warnings": ["it was busy"], **reliable}))
    table = seconds_from_profile(path, [900.0, 100.0], Guidance(1.0), "cpu", "float32")
    assert table.costs == pytest.approx([0.02, 0.01])
    assert table.spread == pytest.approx(0.2)
    assert table.warnings == [f"{path} is unreliable: it was busy"] * warned
