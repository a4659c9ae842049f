"""Drop fractions over time: their shapes, how they are written, and that samplers take them."""

import pytest
import torch

from dcdit.diffusion import drop_schedules, parse_drop_schedule, sample


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("constant:0.3", {1: 0.3, 0.4: 0.3, 0: 0.3}),
        ("linear:0.6:0.1", {1: 0.6, 0.5: 0.35, 0.25: 0.225, 0: 0.1}),
        ("linear:0:0.5", {1: 0, 0.5: 0.25, 0: 0.5}),
        ("cosine:0.6:0.2", {1: 0.6, 2 / 3: 0.5, 0.5: 0.4, 1 / 3: 0.3, 0: 0.2}),
        ("steps:0.6,0.5=0.3,0.2=0", {1: 0.6, 0.501: 0.6, 0.5: 0.3, 0.201: 0.3, 0.2: 0, 0: 0}),
        ("steps:0.6", {1: 0.6, 0: 0.6}),
    ],
)
def test_shapes(text, expected):
    schedule = parse_drop_schedule(text)
    assert {time: schedule(time) for time in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    "text", ["", "0.3", "linear", "linear:0.6", "linear:0.6:x", "linear:1:2:3", "step:0.5", "steps:0.5,0.3", "steps:"]
)
def test_other_forms_are_refused(text):
    with pytest.raises(ValueError, match=r"drop schedule '.*'; accepted: constant:RHO, linear:FIRST:LAST"):
        parse_drop_schedule(text)


@pytest.mark.parametrize("text", ["constant:1", "linear:-0.1:0", "cosine:0:1.5", "constant:nan", "steps:0.1,0.5=1"])
def test_fractions_out_of_range(text):
    with pytest.raises(ValueError, match=r"drop schedule holds .*; accepted: numbers in \[0, 1\)"):
        parse_drop_schedule(text)


@pytest.mark.parametrize("text", ["steps:0.1,0.2=0.2,0.5=0.3", "steps:0.1,1=0.2", "steps:0.1,0.5=0,0.5=0.1"])
def test_times_out_of_order(text):
    with pytest.raises(ValueError, match=r"times of the drop schedule are .*; accepted: numbers in \(0, 1\), descend"):
        parse_drop_schedule(text)


@pytest.mark.parametrize("method", ["ddim", "euler"])
def test_a_sampler_reads_it_at_its_own_times(method):
    seen = {}

    def model(x, t, y, drop_fraction):
        seen[float(t[0]) / 1000] = drop_fraction.tolist()
        return torch.zeros_like(x)

    schedule = drop_schedules.linear(0.8, 0.0)
    sample(model, torch.tensor([0, 1]), 4, method, shape=(1, 2, 2), drop_fraction=schedule, progress=False)
    assert len(seen) == 4
    assert all(values == pytest.approx([0.8 * time] * 2) for time, values in seen.items())
