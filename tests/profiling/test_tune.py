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
