"""A training step in graphs, on a stand-in for the CUDA driver: bits, sizes, and what cannot be captured."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import capturable_attention, fake_device
from support.fake_device import FakeDriver

from dcdit.checkpoint import load_checkpoint
from dcdit.config import load_config
from dcdit.train import train

SIDE = 8
SMALL = {"grid": [SIDE, SIDE], "in_channels": 3, "hidden_size": 128, "depth": 2, "num_heads": 2}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    capturable_attention.install(monkeypatch, SIDE**2)
    monkeypatch.setattr("dcdit.graphs.exact.size_of", lambda total, *_: total)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield fake_device.install(monkeypatch)
    torch.set_num_threads(threads)


@pytest.fixture
def run(archive: Path, tmp_path: Path) -> Any:
    """Trains and returns the records and the weights."""

    def start(out: str, resume: str | None = None, **keys: Any) -> tuple[list[dict[str, Any]], Any]:
        values = {
            "model.name": "DC-DiT-S",
            "model.overrides": SMALL,
            "data.kind": "npz",
            "data.path": str(archive),
            "data.size": SIDE,
            "run.out": str(tmp_path / out),
            "run.log_every": 1,
            "run.eval_every": 0,
            "optim.steps": 12,
            "optim.batch_size": 4,
            # Exact in float32, as the graph holds it.
            "optim.lr": 2.0**-9,
            "optim.device": "cpu",
            "router.group_size": 4,
            "router.drop_warmup_steps": 4,
            **keys,
        }
        result = train(load_config(None, values), resume=None if resume is None else tmp_path / resume)
        lines = [json.loads(line) for line in result.log.read_text().splitlines()]
        return lines, load_checkpoint(result.checkpoint)

    return start


def assert_equal_runs(mine: Any, other: Any) -> None:
    for a, b in zip(mine[0], other[0], strict=True):
        assert {**a, "images_per_s": 0} == {**b, "images_per_s": 0}
    for part in ("model", "ema", "optimizer"):
        theirs = getattr(other[1], part)
        for name, tensor in getattr(mine[1], part).items():
            assert tensor.equal(theirs[name]), name


@pytest.mark.parametrize("name", ["DC-DiT-S", "DiT-S/2"])
def test_graphs_give_the_bits_of_plain_steps(run: Any, fake: FakeDriver, name: str) -> None:
    keys = {"model.name": name}
    plain = run("plain", **keys)
    assert not fake.graphs
    graphed = run("graphed", **keys, **{"optim.graph": True})
    assert len(fake.graphs) > 4 if name == "DC-DiT-S" else len(fake.graphs) == 1
    assert sum(graph.replays for graph in fake.graphs) >= 10
    assert_equal_runs(graphed, plain)
