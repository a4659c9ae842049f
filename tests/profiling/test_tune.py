"""The tuner on a false clock: it finds the fastest configuration and refuses one that computes something else."""

import random
from typing import Any

import pytest
import torch

from dcdit.profiling import tune
from dcdit.profiling.reliability import DISAGREEMENT
from dcdit.profiling.rounds import spread
from dcdit.profiling.workloads import WORKLOADS, Shape, create_workload

SHAPE = Shape(2, (4, 5), 16, 0.5, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_runs_forward_and_backward(name: str) -> None:
    workload = create_workload(name, SHAPE)
    results = workload.run()
    assert len(results) > len(workload.differentiable)
    for value in results:
        assert not value.is_floating_point() or bool(value.isfinite().all())


def test_climb_finds_the_fastest_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    from dcdit.kernels import launch

    def milliseconds(name: str, shape: Shape, seconds: float) -> tune.Timing:
        config = launch.config_for("gather", shape.device, D=shape.width)
        return tune.Timing(abs(config["ROWS"] - 16) + abs(config["num_warps"] - 1) + 1.0, 0.01)

    monkeypatch.setattr(tune, "_time", milliseconds)
    table = tune.tune(["gather_tokens"], [SHAPE], 0.0)
    (entry,) = (entry for entry in table["gather"] if entry["shape"]["D"] == 16)
    assert (entry["config"]["ROWS"], entry["config"]["num_warps"]) == (16, 1)
    measured = entry["measured"]
    assert measured["ms"] == 1.0 < measured["ms_before"] == measured["ms_before_again"]
    assert measured["spread"] == 0.01
    assert not tune.report(table).startswith("Unreliable")


def measured_with(noise: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The entry of a tuning in which every configuration takes 1 ms, and ``noise()`` says how that is measured."""
    monkeypatch.setattr(tune, "_same", lambda *_: True)

    def rounds(*_: object) -> Any:
        return type("Rounds", (), {"times": lambda self, name: [noise() for _ in range(25)]})()

    monkeypatch.setattr(tune, "time_rounds", rounds)
    return {"shape": {"D": 16}, **tune._climb("gather_tokens", SHAPE, "gather", {"ROWS": 4, "num_warps": 4}, 0.0)}


@pytest.mark.parametrize("size", [0.03, 0.2, 1.0])
def test_noise_is_no_gain(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of configurations that are equally fast, the one in use stays, and times that scatter too much are said first."""
    numbers = random.Random(0)
    entry = measured_with(lambda: 1 + size * numbers.random(), monkeypatch)
    assert entry["config"] == {"ROWS": 4, "num_warps": 4}
    assert (entry["measured"]["spread"] > DISAGREEMENT) == (size == 1.0)
    assert tune.report({"gather": [entry]}).startswith("Unreliable: 1 of 1") == (size == 1.0)


def test_a_machine_that_slows_down_is_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The times of each candidate scatter little, but those of the first differ from its own at the end."""
    calls: list[int] = []
    entry = measured_with(lambda: calls.append(1) or 1 + len(calls) / 500, monkeypatch)
    assert entry["measured"]["spread"] < DISAGREEMENT
    text = tune.report({"gather": [entry]})
    assert text.startswith("Unreliable: 1 of 1") and "gather D=16" in text.splitlines()[0]
    (row,) = (line for line in text.splitlines() if line.startswith("| gather"))
    assert "unreliable" in row


def test_a_single_time_is_no_measurement() -> None:
    once = tune.Timing(1.0, spread([1.0]))
    assert not once.is_faster_than(tune.Timing(2.0, 0.0)) and not tune.Timing(1.0, 0.0).is_faster_than(once)
    assert tune._is_noisy(ms=1.0, spread=once.spread, ms_before=1.0, ms_before_again=1.0)


def test_every_kernel_is_saved_when_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tuning that is stopped leaves what it found so far."""
    monkeypatch.setattr(tune, "_climb", lambda name, shape, kernel, config, seconds: {"config": config})
    saved: list[list[tuple[str, int]]] = []

    def save(table: tune.Table) -> None:
        saved.append([(kernel, len(entries)) for kernel, entries in table.items()])

    tune.tune(["gather_tokens"], [SHAPE, SHAPE._replace(width=32)], 0.0, save)
    kernels = [kernel for kernel, _ in saved[-1]]
    assert saved[0] == [(kernels[0], 1)]
    assert saved[-1] == [(kernel, 2) for kernel in kernels]
    assert len(saved) == 2 * len(kernels)


def test_a_table_keeps_the_shapes_that_are_not_tuned_again() -> None:
    def entry(rows: int, width: int) -> dict:
        return {"shape": {"D": width}, "config": {"ROWS": rows}}

    earlier = {"gather": [entry(1, 64), entry(2, 1152)], "scatter": [entry(3, 64)]}
    found = tune.merged(earlier, {"gather": [entry(4, 1152)], "new": [entry(5, 64)]})
    assert found == {"gather": [entry(1, 64), entry(4, 1152)], "scatter": [entry(3, 64)], "new": [entry(5, 64)]}


def test_copies_of_a_workload_lie_elsewhere_and_compute_the_same() -> None:
    for name in WORKLOADS:
        workload = create_workload(name, SHAPE)
        copy = workload.copy()
        for argument, value in workload.arguments.items():
            other = copy.arguments[argument]
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, other)
                assert value.stride() == other.stride()
                assert value.requires_grad == other.requires_grad
                assert value.data_ptr() != other.data_ptr()
        for a, b in zip(workload.run(), copy.run(), strict=True):
            assert torch.equal(a, b)


def test_candidates_are_timed_inside_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, and behind a pause where no graph is possible; never one call per pair of events."""
    h100 = SHAPE._replace(device=torch.device("cuda", 0))
    workload = create_workload("gather_tokens", SHAPE)
    monkeypatch.setattr(tune, "_workloads", lambda *_: [workload, workload])
    monkeypatch.setattr(tune, "time_rounds", lambda *_: pytest.fail("timed one call at a time"))
    monkeypatch.setattr(tune, "time_kernels", lambda *_: [1.0, 2.0, 3.0])
    monkeypatch.setattr(tune, "time_graph", lambda calls, *_: [0.5 * len(calls)] * 3)
    assert tune._time("gather_tokens", h100, 0.1) == (1.0, 0.0)
    monkeypatch.setattr(tune, "time_graph", lambda *_: None)
    assert tune._time("gather_tokens", h100, 0.1) == (2.0, 0.25)


def test_climb_refuses_a_configuration_with_other_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_time", lambda *_: tune.Timing(1.0 / (1 + len(asked)), 0.0))
    asked: list[int] = []

    def same(*_: object) -> bool:
        asked.append(1)
        return False

    monkeypatch.setattr(tune, "_same", same)
    start = {"ROWS": 4, "num_warps": 4}
    assert tune._climb("gather_tokens", SHAPE, "gather", start, 0.0)["config"] == start
    assert asked


def test_a_first_call_never_tunes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "tune", lambda *_: pytest.fail("tuned by itself"))
    create_workload("gather_tokens", SHAPE).forward()


def test_nearest_shape_wins() -> None:
    from dcdit.kernels.launch import config_for, shipped_configs

    entries = shipped_configs()["modulation_fwd"]
    by_width = {entry["shape"]["D"]: entry["config"] for entry in entries}
    assert config_for("modulation_fwd", torch.device("cpu"), D=400) == by_width[384]
    assert config_for("modulation_fwd", torch.device("cpu"), D=1152) == by_width[1024]


def test_shipped_configurations_are_well_formed() -> None:
    from dcdit.kernels.launch import shipped_configs

    for kernel, entries in shipped_configs().items():
        assert entries, kernel
        for entry in entries:
            assert set(entry) - {"measured"} == {"shape", "config"}, kernel
            assert all(isinstance(v, int) and v > 0 for v in (*entry["shape"].values(), *entry["config"].values()))
