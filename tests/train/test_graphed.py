"""A training step in graphs, on a stand-in for the CUDA driver: bits, sizes, and what cannot be captured."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import capturable_attention, fake_device
from support.fake_device import FakeDriver
from support.programs import environment

from dcdit.checkpoint import load_checkpoint
from dcdit.config import dump_yaml, load_config, override
from dcdit.graphs import CaptureError
from dcdit.train import graphed as graphed_steps
from dcdit.train import train
from dcdit.train.graphed import PLAIN_STEPS

SIDE = 8
CLIP = 1.0
SMALL = {"grid": [SIDE, SIDE], "in_channels": 3, "hidden_size": 128, "depth": 2, "num_heads": 2}
SPARSE = {**SMALL, "modules": 1, "sparse_depth": 1, "depth": 5, "pooled": 1, "sparse_grid": [2, 2]}


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
    """Trains and returns the records, the checkpoint and the configuration."""

    def start(out: str, resume: str | None = None, **keys: Any) -> Any:
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
        config = load_config(None, values)
        result = train(config, resume=None if resume is None else tmp_path / resume)
        lines = [json.loads(line) for line in result.log.read_text().splitlines()]
        return lines, load_checkpoint(result.checkpoint), config

    return start


def assert_equal_runs(mine: Any, other: Any) -> None:
    for a, b in zip(mine[0], other[0], strict=True):
        assert {**a, "images_per_s": 0} == {**b, "images_per_s": 0}
    for part in ("model", "ema", "optimizer"):
        theirs = getattr(other[1], part)
        for name, tensor in getattr(mine[1], part).items():
            assert tensor.equal(theirs[name]), name


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("DC-DiT-S", {}),
        ("DC-DiT-S", {"router": "uniform"}),
        ("DC-DiT-S", {"router": "dithered", "cell_context": True}),
        ("DiT-S/2", {}),
    ],
)
def test_graphs_give_the_bits_of_plain_steps(run: Any, fake: FakeDriver, name: str, overrides: dict[str, Any]) -> None:
    """Gradients are clipped in some of these steps, and two weights of a DC-DiT share one gradient."""
    keys = {"model.name": name, "model.overrides": {**SMALL, **overrides}}
    plain = run("plain", **keys, **{"optim.graph": False})
    norms = [record["grad_norm"] for record in plain[0]]
    assert min(norms) < CLIP < max(norms[PLAIN_STEPS:])
    assert not fake.graphs
    graphed = run("graphed", **keys)
    sizes = len({record.get("kept") for record in graphed[0][PLAIN_STEPS:]})
    assert len(fake.graphs) == (2 + sizes if name == "DC-DiT-S" else 1)
    assert sizes > 2 or name == "DiT-S/2"
    steps = 12 - PLAIN_STEPS
    assert sum(graph.replays for graph in fake.graphs) == (3 * steps if name == "DC-DiT-S" else steps)
    assert_equal_runs(graphed, plain)


@pytest.mark.parametrize("graph", [False, True])
def test_a_run_on_a_gpu_is_resumed(run: Any, fake: FakeDriver, graph: bool) -> None:
    """The optimiser is fused there: it must find weights and moments in the same memory format."""
    whole = run("whole", **{"optim.graph": graph})
    run("parts", **{"optim.graph": graph, "optim.steps": 6})
    assert_equal_runs(run("parts", resume="parts", **{"optim.graph": graph}), whole)


@pytest.mark.parametrize("name", ["DC-DiT-S", "DiT-S/2"])
def test_passes_add_up(run: Any, fake: FakeDriver, name: str) -> None:
    keys = {"model.name": name, "optim.accumulate": 2, "router.group_size": 2}
    plain = run("plain", **keys, **{"optim.graph": False})
    assert_equal_runs(run("graphed", **keys), plain)


@pytest.mark.parametrize("failing", [7, 5], ids=["between two passes", "in the update"])
def test_a_capture_that_fails_late(run: Any, fake: FakeDriver, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """What is in the buffer by then is not lost."""
    keys = {"optim.accumulate": 2, "router.group_size": 2}
    plain = run("plain", **keys, **{"optim.graph": False})
    captures = []

    def capture(*args: Any, **options: Any) -> Any:
        captures.append(args[3])
        if len(captures) == failing:
            raise CaptureError("this capture failed")
        return cuda_capture(*args, **options)

    cuda_capture = graphed_steps.cuda.capture
    monkeypatch.setattr(graphed_steps.cuda, "capture", capture)
    assert_equal_runs(run("graphed", **keys), plain)
    assert [what.split(" on ")[0] for what in captures] == [
        "encoder and router in training", "the modulation in training", "the training pass", "the training pass",
        "the update of the weights", "the training pass", "the training pass",
    ][:failing]  # fmt: skip


def test_two_processes_train_like_one(run: Any, tmp_path: Path) -> None:
    """In graphs, on the stand-in for the driver, with gradients that gloo adds up. The order of sums differs."""
    one = run("one", **{"optim.batch_size": 8, "optim.lr": 2.0**-12, "optim.steps": 6})
    (tmp_path / "two.yaml").write_text(dump_yaml(override(one[2], {"optim.graph": True})))
    command = [sys.executable, str(Path(__file__).with_name("graphed_runs.py")), str(tmp_path / "two.yaml")]
    done = subprocess.run([*command, str(tmp_path / "two")], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").open()]
    for ours, theirs in zip(log, one[0], strict=True):
        assert {**ours, "images_per_s": 0} == pytest.approx({**theirs, "images_per_s": 0}, rel=1e-5)


def test_steps_are_plain_while_the_target_changes(run: Any, fake: FakeDriver) -> None:
    keys = {"router.target_start": 2.0, "router.target_warmup_steps": 9}
    plain = run("plain", **keys, **{"optim.graph": False})
    graphed = run("graphed", **keys, **{"optim.graph": True})
    assert fake.graphs[0].replays == 12 - 9
    assert_equal_runs(graphed, plain)


def test_old_sizes_go(run: Any, fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed_steps, "MAX_GRAPHS", 1)
    captured = len({record["kept"] for record in run("a", **{"optim.graph": True})[0][PLAIN_STEPS:]})
    assert len(fake.graphs) >= 2 + captured > 4


def test_training_goes_on_where_a_capture_fails(run: Any, fake: FakeDriver, caplog: pytest.LogCaptureFixture) -> None:
    plain = run("plain", **{"optim.graph": False})
    fake.fail_at = {"capture_begin"}
    assert_equal_runs(run("a"), plain)
    assert caplog.text.count("training goes on without CUDA graphs") == 1
    with pytest.raises(CaptureError, match="encoder and router in training cannot be captured: Inj"):
        run("b", **{"optim.graph": True})


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"model.overrides": {**SMALL, "dynamic_width": True}, "width.group_size": 4}, "its width is dynamic"),
        ({"optim.compile": True}, "optim.compile is true, and a DC-DiT in graphs runs part by part"),
        ({"model.name": "SparseDiT-S/2", "model.overrides": SPARSE}, "a SparseDiT reads on the host"),
    ],
    ids=["width", "compile", "sparse"],
)
def test_what_cannot_be_captured(run: Any, fake: FakeDriver, keys: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"optim.graph is true but steps cannot be captured: {reason}"):
        run("a", **keys, **{"optim.graph": True})


def test_checks_of_values_cannot_be_captured(run: Any, fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DCDIT_CHECK", "1")
    with pytest.raises(ValueError, match="steps cannot be captured: DCDIT_CHECK=1 reads values on the host"):
        run("a", **{"optim.graph": True})


def test_a_cpu_has_no_graphs(run: Any) -> None:
    with pytest.raises(ValueError, match="the model is on cpu; CUDA graphs need a CUDA device"):
        run("a", **{"optim.graph": True})


def test_attention_that_reads_lengths(run: Any, fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(graphed_steps, "waits_in_attention", lambda model, dtype: bool(seen.append(dtype)) or True)
    with pytest.raises(ValueError, match="attention in fp32 reads lengths on the host"):
        run("a", **{"optim.graph": True})
    assert seen == [torch.float32]


def test_frozen_weights_stay(run: Any, fake: FakeDriver) -> None:
    """Where gradients are added up in a buffer, too: weight decay must not find any for them."""
    static = {"model.name": "DiT-S/2", "optim.steps": 1, "optim.graph": False}
    source = run("source", **static)[2].run.out
    overrides = {**SMALL, "depth": 2, "adapt_conditioning": True}
    keys = {
        "upcycle.source": source, "upcycle.distill_steps": 0, "model.overrides": overrides, "optim.steps": 5,
        "optim.weight_decay": 0.5, "optim.accumulate": 2, "router.group_size": 2,
    }  # fmt: skip
    plain = run("plain", **keys, **{"optim.graph": False})
    graphed = run("graphed", **keys, **{"optim.graph": True})
    assert_equal_runs(graphed, plain)
    assert graphed[1].optimizer.keys() == plain[1].optimizer.keys()


def test_training_goes_on_where_memory_is_short(
    run: Any, fake: FakeDriver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The pass before a capture needs activations beside those of the graphs."""
    plain = run("plain", **{"optim.graph": False, "optim.steps": 5})
    calls, backward = [], graphed_steps.GraphedStep._backward

    def short(self: Any, *args: Any, **options: Any) -> Any:
        calls.append(len(fake.graphs))
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return backward(self, *args, **options)

    monkeypatch.setattr(graphed_steps.GraphedStep, "_backward", short)
    assert_equal_runs(run("a", **{"optim.steps": 5}), plain)
    assert calls == [2, 2, 3], "in the rehearsal of the second size"
    assert "training goes on without CUDA graphs" in caplog.text
