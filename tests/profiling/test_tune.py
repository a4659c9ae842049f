"""The tuner on a false clock: it finds the fastest configuration and refuses one that computes something else."""

import pytest
import torch

from dcdit.profiling import tune
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

    def milliseconds(name: str, shape: Shape, seconds: float) -> float:
        config = launch.config_for("gather", shape.device, D=shape.width)
        return abs(config["ROWS"] - 16) + abs(config["num_warps"] - 1) + 1.0

    monkeypatch.setattr(tune, "_time", milliseconds)
    table = tune.tune(["gather_tokens"], [SHAPE], 0.0)
    best = {entry["shape"]["D"]: entry["config"] for entry in table["gather"]}[16]
    assert (best["ROWS"], best["num_warps"]) == (16, 1)


def test_every_kernel_is_saved_when_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tuning that is stopped leaves what it found so far."""
    monkeypatch.setattr(tune, "_climb", lambda name, shape, kernel, config, seconds: config)
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
    monkeypatch.setattr(tune, "time_variants", lambda *_: pytest.fail("timed one call at a time"))
    monkeypatch.setattr(tune, "time_kernels", lambda *_: 2.0)
    monkeypatch.setattr(tune, "time_graph", lambda calls, *_: 0.5 * len(calls))
    assert tune._time("gather_tokens", h100, 0.1) == 1.0
    monkeypatch.setattr(tune, "time_graph", lambda *_: None)
    assert tune._time("gather_tokens", h100, 0.1) == 2.0


def test_climb_refuses_a_configuration_with_other_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_time", lambda *_: 1.0 / (1 + len(asked)))
    asked: list[int] = []

    def same(*_: object) -> bool:
        asked.append(1)
        return False

    monkeypatch.setattr(tune, "_same", same)
    start = {"ROWS": 4, "num_warps": 4}
    assert tune._climb("gather_tokens", SHAPE, "gather", start, 0.0) == start
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
            assert set(entry) == {"shape", "config"}, kernel
            assert all(isinstance(v, int) and v > 0 for v in (*entry["shape"].values(), *entry["config"].values()))
