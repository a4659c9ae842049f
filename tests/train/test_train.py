"""Whole runs of a tiny model on a CPU: what a step does, exact resuming, and the errors of what does not fit."""

import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.programs import environment
from torch.optim.optimizer import register_optimizer_step_post_hook

from dcdit import checkpoint as ckpt
from dcdit import ops
from dcdit.config import dump_yaml, override
from dcdit.data import NpzDataset, batches
from dcdit.diffusion import DiTObjective
from dcdit.models import count_flops, create_model
from dcdit.ops import ratio_loss
from dcdit.train import EMA, train
from dcdit.train.schedule import NOISE, seed_of
from dcdit.train.trackers import Trackers

TINY = {"in_channels": 3, "grid": [8, 8], "hidden_size": 128, "depth": 1, "num_heads": 2}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def config(archive, tmp_path):
    def config(*overrides, out="run"):
        data = {
            "model": {"name": "DC-DiT-S", "num_classes": 3, "overrides": TINY},
            "data": {"kind": "npz", "path": str(archive), "held_out": 0.25},
            "optim": {"steps": 4, "batch_size": 4, "lr": 1e-3, "ema_decay": 0.9, "device": "cpu"},
            "router": {"group_size": 2, "target": 2.0, "drop_fractions": [0.0, 0.5], "drop_warmup_steps": 1},
            "run": {"out": str(tmp_path / out), "log_every": 1, "eval_every": 0, "eval_images": 3},
        }
        return override(data, overrides)

    return config


def records(result):
    return [json.loads(line) for line in result.log.read_text().splitlines()]


def without_speed(result):
    return [{k: v for k, v in record.items() if k != "images_per_s"} for record in records(result)]


def test_the_card_of_a_run_says_how_it_was_trained(config, archive):
    result = train(config("optim.steps=2", "run.eval_every=2"))
    card = (result.checkpoint / "README.md").read_text()
    last, validated = records(result)[-2:]
    recipe = json.loads(card.split("```json")[1].split("```")[0])
    assert f"- data: npz of {archive.name}; " in card
    assert str(archive.parent) not in card
    assert f"- steps: 2\n- training compute: {last['flops']:.4g} FLOPs" in card
    assert f"- validation loss, averaged weights: {validated['val_loss_ema']:.4g}" in card
    assert recipe["optim"] == {"steps": 2, "batch_size": 4, "lr": 1e-3, "ema_decay": 0.9}
    assert "run" not in recipe
    assert ckpt.model_card(ckpt.load_model(result.checkpoint), ckpt.read_metadata(result.checkpoint)) == card


def test_sizes_that_the_data_tell(config):
    """Without them in the configuration, the model is the same as with them."""
    sizes = {name: value for name, value in TINY.items() if name not in ("in_channels", "grid")}
    given = train(config("optim.steps=1", out="given"))
    found = train(
        config("optim.steps=1", "model.num_classes=null", f"model.overrides={json.dumps(sizes)}", out="found")
    )
    assert_same_weights(given.checkpoint, found.checkpoint)
    model = ckpt.load_model(found.checkpoint)
    assert (model.config.grid, model.config.in_channels, model.config.num_classes) == ((8, 8), 3, 3)
    assert model.config.dechunk_sigma == 1.0
    assert json.loads(ckpt.read_metadata(found.checkpoint)["class_names"]) == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.image_size=128", r"the data has shape \(3, 8, 8\), the model takes \(3, 16, 16\)"),
        ("model.overrides.in_channels=4", r"the data has shape \(3, 8, 8\), the model takes \(4, 8, 8\)"),
        ("model.overrides.num_classes=3", "model.overrides has 'num_classes'; accepted: model.num_classes instead"),
    ],
)
def test_sizes_that_contradict_the_data(config, change, message):
    overrides = [] if "overrides" in change else ['model.overrides={"hidden_size": 128, "num_heads": 2, "depth": 1}']
    with pytest.raises(ValueError, match=message):
        train(config(*overrides, change))


def assert_same_weights(a, b):
    """Bit for bit: weights, averaged weights and optimiser state of two checkpoints."""
    one, two = ckpt.load_checkpoint(a), ckpt.load_checkpoint(b)
    for part in ("model", "ema", "optimizer"):
        left, right = getattr(one, part), getattr(two, part)
        assert left and left.keys() == right.keys()
        for name in left:
            assert torch.equal(left[name], right[name]), f"{part} {name}"


def stop_at(step):
    """A callback that presses Ctrl-C when this step's record is written."""
    return lambda record: os.kill(os.getpid(), signal.SIGINT) if record["step"] == step else None


# --- what a step does ---------------------------------------------------------------------------------------------


def test_run_equals_a_plain_loop(config, archive):
    """Two steps against the recipe written out: objective, ratio loss, clipping, AdamW with warm-up, average."""
    settings = config("optim.steps=2", "optim.warmup_steps=4", "router.drop_fractions=[0.5]", "optim.grad_clip=0.1")
    saved = ckpt.load_checkpoint(train(settings).checkpoint)

    torch.manual_seed(0)
    model = create_model("DC-DiT-S", num_classes=3, **TINY)
    ema = EMA(model, 0.9)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for step, (x, y) in enumerate(batches(NpzDataset(archive, held_out=0.25), 0, 2, 4)):
        optimizer.param_groups[0]["lr"] = 1e-3 * (step + 1) / 4
        generator = torch.Generator().manual_seed(seed_of(0, NOISE, step))
        t, noise = DiTObjective().draw(x.shape, x.device, generator)
        y = y.masked_fill(torch.rand(4, generator=generator) < 0.1, 3)
        model.y_embedder.eval()
        routing = []

        def predict(x, t, y, step=step, routing=routing):
            out, found = model(x, t, y, drop_fraction=0.5 if step else 0.0, return_routing=True)
            routing.append(found)
            return out

        loss = DiTObjective().losses(predict, x, y, t, noise)["loss"].mean()
        loss = loss + 0.03 * ratio_loss(routing[0].prob, routing[0].natural_mask, 2.0, 2)
        optimizer.zero_grad()
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1) > 0.1
        optimizer.step()
        ema.update()
    for name, tensor in model.state_dict().items():
        assert torch.equal(saved.model[name], tensor), name
        assert torch.equal(saved.ema[name], ema.state[name]), name


def test_records_and_result(config):
    seen = []
    result = train(config("run.eval_every=2"), callbacks=[seen.append])
    assert (result.step, result.reason, result.main_process) == (4, "steps", True)
    assert result.checkpoint == ckpt.find_checkpoint(result.log.parent)
    assert records(result) == seen
    training = [record for record in seen if "loss" in record]
    assert [record["step"] for record in training] == [1, 2, 3, 4]
    assert all(np.isfinite(list(record.values())).all() for record in seen)
    for record in training:
        assert record["loss"] == pytest.approx(record["diffusion_loss"] + 0.03 * record["ratio_loss"])
        assert 0 < record["kept"] <= 1 and record["kept"] <= record["natural"] + 1 / 64
        assert record["images_per_s"] > 0
    assert training[0]["drop_fraction"] == 0
    assert {record["drop_fraction"] for record in training} <= {0.0, 0.5}
    assert [record["step"] for record in seen if "val_loss" in record] == [2, 4]
    assert ckpt.read_trainer(result.checkpoint)["config"]["optim"]["lr"] == 1e-3
    assert ckpt.read_metadata(result.checkpoint)["objective"] == "dit"


def test_a_model_learns(config):
    """Nine images again and again: the loss falls."""
    overrides = ["optim.steps=60", "optim.lr=3e-3", "diffusion.objective=flow", "router.drop_warmup_steps=99"]
    losses = [record["loss"] for record in records(train(config(*overrides, "data.flip=false")))]
    assert np.mean(losses[-10:]) < 0.75 * np.mean(losses[:5])


def test_validation_leaves_training_alone(config):
    plain = train(config(out="a"))
    watched = train(config("run.eval_every=1", out="b"))
    assert_same_weights(plain.checkpoint, watched.checkpoint)


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim.precision=bf16"],
        ["optim.accumulate=2", "data.workers=1"],
        ["diffusion.objective=flow", "model.overrides.learn_sigma=false"],
        ["router.group_size=null", "model.overrides.router=cosine1d", "model.overrides.dechunk=ema"],
        ["router.target=4", "model.overrides.router=uniform"],
    ],
    ids=["bf16", "accumulate", "flow", "h-net", "uniform"],
)
def test_variants_train(config, overrides):
    result = train(config("optim.steps=2", "run.eval_every=2", *overrides))
    before, after = (ckpt.load_model(result.checkpoint, ema=ema).state_dict() for ema in (True, False))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in after.values())
    assert all(np.isfinite(list(record.values())).all() for record in records(result))


def test_compiled_training_does_not_recompile_as_lengths_change(config, monkeypatch):
    """The first counts teach the compiler which sizes change; then it is done. Losses are those of a plain run."""
    graphs, compiled = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("eager")(graph, inputs)

    overrides = ["optim.steps=14", "router.drop_fractions=[0.0, 0.1, 0.3, 0.6]"]
    eager = train(config(*overrides, out="eager"))
    torch._dynamo.reset()
    compile_model = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile_model(model, backend=backend))
    result = train(config(*overrides, "optim.compile=true"), callbacks=[lambda record: compiled.append(len(graphs))])
    kept = [record["kept"] for record in records(result)]
    assert compiled[0] > 0 and compiled[7] == compiled[-1], compiled
    assert len({*kept[8:]} - {*kept[:8]}) >= 5
    for ours, theirs in zip(records(result), records(eager), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_static_baseline_trains(config):
    result = train(config("model.name=DiT-S/2", "run.eval_every=4"))
    assert type(ckpt.load_model(result.checkpoint)).__name__ == "DiT"
    assert "kept" not in records(result)[0] and records(result)[0]["loss"] == records(result)[0]["diffusion_loss"]


@pytest.mark.parametrize("name", ["DC-DiT-S", "DiT-S/2"])
def test_the_split_of_a_batch_changes_nothing(config, name, tmp_path):
    """One pass of one process, and two passes each of two processes that `accelerate launch` starts."""
    settings = ["optim.batch_size=8", "run.eval_every=4"]
    one = train(override(config(*settings, out="one"), {"model.name": name}))
    split = override(config(*settings, "optim.accumulate=2", "data.workers=1", out="two"), {"model.name": name})
    (tmp_path / "two.yaml").write_text(dump_yaml(split))
    # The launcher starts several processes for GPUs only; on which device they compute is the run's own business.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["-m", "dcdit", "train", "--config", str(tmp_path / "two.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("steps done") == 1
    both = records(one), [json.loads(line) for line in (tmp_path / "two/log.jsonl").open()]
    for ours, theirs in zip(*both, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"images_per_s"}:
            # Counts are equal; real numbers are sums in another order, in float32 and after up to four steps.
            exact = key in ("step", "kept", "natural", "drop_fraction", "target", "flops", "lr")
            assert theirs[key] == (ours[key] if exact else pytest.approx(ours[key], rel=1e-5)), key


def test_sharded_training(config, tmp_path):
    """Two processes that divide every weight: the losses of one process, exact resuming, and whole checkpoints.

    Losses differ by the order of sums in float32 only, as in the test above.
    """
    settings = config("optim.batch_size=8", "optim.accumulate=2", "run.eval_every=2", "run.checkpoint_every=2")
    one = train(settings)
    (tmp_path / "config.yaml").write_text(dump_yaml(override(settings, {"optim.shard": True})))
    command = [sys.executable, str(Path(__file__).with_name("sharded_runs.py")), str(tmp_path / "config.yaml")]
    done = subprocess.run([*command, str(tmp_path)], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logs = {name: tmp_path / name / "log.jsonl" for name in ("run", "whole", "stopped", "static")}
    logs = {name: [json.loads(line) for line in log.open()] for name, log in logs.items()}
    for log in logs.values():
        for record in log:
            record.pop("images_per_s", None)
    assert logs["stopped"] == logs["whole"] and len(logs["whole"]) == 6
    for ours, theirs in zip(logs["whole"], logs["run"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5) and ours["step"] == theirs["step"]
    whole, stopped = (ckpt.find_checkpoint(tmp_path / name) for name in ("whole", "stopped"))
    assert_same_weights(whole, stopped)
    sharded, plain = ckpt.load_checkpoint(whole), ckpt.load_checkpoint(one.checkpoint)
    for part in ("model", "ema", "optimizer"):
        for name, tensor in getattr(plain, part).items():
            assert getattr(sharded, part)[name].shape == tensor.shape, f"{part} {name}"
    # A whole checkpoint goes on in any number of processes.
    settings.run.out = str(tmp_path / "whole")
    again = train(settings, resume=ckpt.checkpoint_path(settings.run.out, 2))
    assert records(again)[-2]["loss"] == pytest.approx(logs["run"][-2]["loss"], rel=1e-5)
    assert type(ckpt.load_model(tmp_path / "static")).__name__ == "DiT"


@pytest.mark.parametrize("plugin", ["FSDP", "DEEPSPEED"])
def test_plugins_of_accelerate_are_refused(config, monkeypatch, plugin):
    monkeypatch.setenv(f"ACCELERATE_USE_{plugin}", "true")
    with pytest.raises(ValueError, match=f"^ACCELERATE_USE_{plugin} is true; accepted: false, and optim.shard"):
        train(config())


# --- stopping and going on --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides", [[], ["optim.accumulate=2"], ["model.name=DiT-S/2"]], ids=["dynamic", "accumulate", "static"]
)
def test_resumed_run_is_bitwise_the_uninterrupted_one(config, overrides):
    whole = train(config(*overrides, out="whole"))
    settings = config(*overrides, out="stopped")
    first = train(settings, callbacks=[stop_at(2)])
    assert (first.step, first.reason) == (2, "interrupt")
    torch.manual_seed(12345)
    second = train(settings, resume=first.log.parent)
    assert (second.step, second.reason) == (4, "steps")
    assert_same_weights(whole.checkpoint, second.checkpoint)
    assert without_speed(whole) == without_speed(second)


@pytest.mark.parametrize("name", ["DC-DiT-S", "DiT-S/2"])
def test_flops_are_counted_from_the_lengths_kept(config, name, monkeypatch):
    """Three times the forward passes, over accumulation, dropped tokens and a resumed run."""
    lengths = []
    gather = ops.gather_tokens

    def recording(x, sel, *args):
        lengths.append(sel.lengths.tolist())
        return gather(x, sel, *args)

    monkeypatch.setattr(ops, "gather_tokens", recording)
    settings = override(config("optim.accumulate=2", "run.log_every=2", out="stopped"), {"model.name": name})
    first = train(settings, callbacks=[stop_at(2)])
    result = train(settings, resume=first.log.parent)
    assert [record["step"] for record in records(result)] == [2, 4]
    model = ckpt.load_model(result.checkpoint).config
    if name == "DC-DiT-S":
        assert len(lengths) == 8 and len({sum(part) for part in lengths}) > 1
        expected = [3 * sum(count_flops(model, part)["total"] for part in lengths[:n]) for n in (4, 8)]
    else:
        expected = [3 * count_flops(model, batch=4 * steps)["total"] for steps in (2, 4)]
    assert [record["flops"] for record in records(result)] == expected
    assert ckpt.read_trainer(result.checkpoint)["flops"] == expected[-1]


def test_flops_limit(config):
    """The run stops at the first record that has spent them, and does so again when it is resumed."""
    per_step = 3 * count_flops(create_model("DiT-S/2", num_classes=3, **TINY).config, batch=4)["total"]
    static = ["model.name=DiT-S/2", "optim.steps=1000", "run.log_every=2", "run.checkpoint_every=1"]
    settings = override(config(*static), {"optim.flops": 2.5 * per_step})
    for resume in (None, settings.run.out):
        result = train(settings, resume=resume)
        assert (result.step, result.reason) == (4, "flops")
    assert records(result)[-1]["flops"] == 4 * per_step
    settings.optim.flops = 5 * per_step
    assert train(settings, resume=settings.run.out).step == 6


def test_resume_repeats_lost_steps(config):
    """A crash after the checkpoint: the steps behind it are done again, in the log too."""
    settings = config("run.checkpoint_every=2", out="crashed")
    result = train(settings)
    settings.run.checkpoint_every = 100
    again = train(settings, resume=ckpt.checkpoint_path(settings.run.out, 2))
    assert [record["step"] for record in records(again)] == [1, 2, 3, 4]
    assert_same_weights(result.checkpoint, again.checkpoint)


def test_resume_past_a_damaged_checkpoint(config):
    """The error names the checkpoint to resume from, and the run then ends as it would have without the damage."""
    settings = config("run.checkpoint_every=1", "run.keep_checkpoints=2")
    before = train(settings).checkpoint
    expected = before.rename(before.with_name("undamaged"))
    run = expected.parents[1]
    ckpt.checkpoint_path(run, 4).mkdir()
    (ckpt.checkpoint_path(run, 4) / ckpt.MODEL_FILE).write_bytes((expected / ckpt.MODEL_FILE).read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"step_00000004.* is damaged .*: --resume \S*/step_00000003$") as error:
        train(settings, resume=run)
    result = train(settings, resume=str(error.value).split()[-1])
    assert_same_weights(expected, result.checkpoint)


def test_resume_of_a_finished_run_can_be_extended(config):
    train(config())
    result = train(config("optim.steps=5"), resume=config().run.out)
    assert result.step == 5
    assert train(config("optim.steps=5"), resume=config().run.out).step == 5


@pytest.mark.parametrize(
    "overrides",
    [["optim.precision=bf16", "optim.accumulate=2"], ["model.name=DiT-S/2", "run.eval_every=2"]],
    ids=["dynamic-bf16-accumulate", "static"],
)
def test_a_run_killed_at_any_moment_goes_on_bitwise(config, tmp_path, overrides):
    """SIGKILL before one of many file operations: between steps, in log lines, inside and around checkpoints."""
    saving = ["run.checkpoint_every=1", "run.keep_checkpoints=1"]
    whole = train(config(*overrides, *saving, out="whole"))
    (tmp_path / "config.yaml").write_text(dump_yaml(config(*overrides, *saving)))
    command = [sys.executable, str(Path(__file__).with_name("killed_runs.py")), str(tmp_path / "config.yaml")]
    done = subprocess.run([*command, str(tmp_path / "runs"), "31"], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps = []
    for out in sorted((tmp_path / "runs").iterdir(), key=lambda out: int(out.name)):
        begun = bool(ckpt.list_checkpoints(out))
        steps.append(ckpt.read_trainer(out)["step"] if begun else 0)
        again = train(config(*overrides, *saving, out=out), resume=out if begun else None)
        assert_same_weights(whole.checkpoint, again.checkpoint)
        assert without_speed(whole) == without_speed(again)
        assert [path.name for path in (out / "checkpoints").iterdir()] == [whole.checkpoint.name]
        assert sorted(path.name for path in out.iterdir()) == ["checkpoints", "config.yaml", "log.jsonl"]
    assert len(steps) >= 4 and min(steps) == 0 and max(steps) >= 2


def test_a_run_killed_at_some_time_goes_on_bitwise(config, tmp_path):
    """The command itself, and a SIGKILL that nothing in it waits for."""
    saving = ["optim.steps=30", "run.checkpoint_every=3"]
    whole = train(config(*saving, out="whole"))
    settings = config(*saving, out="killed")
    (tmp_path / "killed.yaml").write_text(dump_yaml(settings))
    log = tmp_path / "killed" / "log.jsonl"
    command = [sys.executable, "-m", "dcdit", "train", "--config", str(tmp_path / "killed.yaml")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 10):
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert ckpt.read_trainer(settings.run.out)["step"] < 30
    assert_same_weights(whole.checkpoint, train(settings, resume=settings.run.out).checkpoint)


def test_a_killed_run_on_a_stream_goes_on_bitwise(config, tmp_path):
    """With loading processes and with two ranks, over the end of an epoch."""
    from support.shards import image_shards

    settings = config("optim.steps=7", "run.checkpoint_every=3", "run.eval_every=4", "data.kind=stream", "data.size=8")
    settings.data.path = str(image_shards(tmp_path / "shards", (5, 6, 3, 6, 5, 4)))
    settings.data.shuffle_buffer = 6
    (tmp_path / "config.yaml").write_text(dump_yaml(settings))
    command = [sys.executable, str(Path(__file__).with_name("stream_runs.py")), str(tmp_path / "config.yaml")]
    done = subprocess.run([*command, str(tmp_path)], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for runs in ("1-2", "2-0"):
        whole, killed = (tmp_path / runs / name for name in ("whole", "killed"))
        assert_same_weights(ckpt.find_checkpoint(whole), ckpt.find_checkpoint(killed))
        first, second = (_log(out) for out in (whole, killed))
        assert first == second and [r["step"] for r in first if "val_loss" in r] == [4]
        places = ckpt.read_trainer(killed)["stream"]["places"]
        assert places == ckpt.read_trainer(whole)["stream"]["places"] and max(epoch for epoch, *_ in places) >= 1


def _log(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_s"} for line in lines]


def test_a_run_asked_to_end_at_any_moment_saves_and_goes_on_bitwise(config, tmp_path):
    """Signals to a whole job with loading processes, as schedulers send them; of two ranks also to one alone."""
    settings = config("optim.steps=5", "run.eval_every=2", "run.log_every=50", "run.checkpoint_every=3")
    settings.data.workers = 1
    whole = train(settings)
    (tmp_path / "config.yaml").write_text(dump_yaml(settings))
    command = [sys.executable, str(Path(__file__).with_name("signalled_runs.py")), str(tmp_path / "config.yaml")]
    (tmp_path / "runs").mkdir()
    done = subprocess.run([*command, str(tmp_path / "runs")], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ended = {
        "loading": (1, [143]),
        "stepping": (2, [130]),
        "validating": (2, [143]),
        "saving": (4, [129]),
        "ranks": (2, [143, 143]),
        "rank": (2, [143, 143]),
    }
    for name, (step, codes) in ended.items():
        out = tmp_path / "runs" / name
        assert json.loads((tmp_path / "runs" / f"{name}.json").read_text()) == codes, done.stderr
        assert f"interrupt: {step} steps done; checkpoint {ckpt.checkpoint_path(out, step)}" in done.stdout
        if len(codes) == 1:
            again = train(override(settings, {"run.out": str(out), "data.workers": 0}), resume=out)
            assert_same_weights(whole.checkpoint, again.checkpoint)
            validations = [record for record in records(whole) if "val_loss" in record]
            assert [record for record in records(again) if "val_loss" in record] == validations
            assert [record["step"] for record in records(again)] == [2, 4, 5]


def test_tensorboard_shows_the_records_of_a_resumed_run(config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = config("run.trackers=[tensorboard]", "run.checkpoint_every=1", "run.eval_every=2")
    result = train(settings)
    again = train(settings, resume=ckpt.checkpoint_path(settings.run.out, 1))
    shown = EventAccumulator(str(result.log.parent / "dcdit"))
    shown.Reload()
    for key in ("loss", "kept", "grad_norm", "val_loss", "flops"):
        found = [(event.step, event.value) for event in shown.Scalars(key)]
        assert found == [(r["step"], pytest.approx(r[key])) for r in records(again) if key in r], key


@pytest.mark.parametrize("objective", ["flow", "dit"])
def test_tensorboard_shows_samples_and_they_change_nothing(config, objective, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    common = (f"diffusion.objective={objective}", "run.eval_every=0", "optim.steps=4", "run.trackers=[tensorboard]")
    plain = train(override(config(*common), {"run.out": str(tmp_path / "plain")}))
    drawn = train(override(config(*common, "run.sample_every=2"), {"run.out": str(tmp_path / "drawn")}))
    assert_same_weights(plain.checkpoint, drawn.checkpoint)
    shown = EventAccumulator(str(drawn.log.parent / "dcdit"))
    shown.Reload()
    for name in ("samples", "kept_tokens"):
        pictures = shown.Images(name)
        assert [picture.step for picture in pictures] == [2, 4]
        assert pictures[0].width == 4 * 128 + 3 * 4 and pictures[0].height > 2 * 128
        assert pictures[0].encoded_image_string != pictures[1].encoded_image_string


def test_each_tracker_gets_images_as_it_takes_them():
    """TensorBoard wants to know the order of the axes; Weights & Biases makes an image of each entry."""
    sent = {}

    class Tracker(SimpleNamespace):
        def log_images(self, values, step, **options):
            sent[self.name] = ({name: pictures.shape for name, pictures in values.items()}, step, options)

    trackers = Trackers.__new__(Trackers)
    trackers.accelerator = SimpleNamespace(trackers=[Tracker(name="tensorboard"), Tracker(name="wandb")])
    trackers.write_images({"samples": np.zeros((5, 6, 3), dtype=np.uint8)}, 7)
    shapes = {"samples": (1, 5, 6, 3)}
    assert sent == {"tensorboard": (shapes, 7, {"dataformats": "NHWC"}), "wandb": (shapes, 7, {})}


def test_samples_need_a_tracker(config):
    with pytest.raises(ValueError, match=r"^run.sample_every is 2 and run.trackers names none; accepted: 0, or a tra"):
        train(config("run.sample_every=2"))


def test_trackers_that_are_missing(config, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"^run\.trackers names wandb, which is not installed: pip install "):
        train(config("run.trackers=[wandb]"))


def test_time_limit(config):
    result = train(config("run.minutes=1e-9", "optim.steps=1000"))
    assert (result.step, result.reason) == (1, "minutes")
    assert ckpt.read_trainer(result.checkpoint)["step"] == 1


def test_old_checkpoints_go(config):
    result = train(config("run.checkpoint_every=1", "run.keep_checkpoints=2"))
    assert [path.name for path in ckpt.list_checkpoints(result.log.parent)] == ["step_00000003", "step_00000004"]


@pytest.mark.parametrize("launcher", ["ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", None])
def test_a_run_ends_with_its_launcher(config, monkeypatch, launcher):
    """That of one process dies of SIGTERM and passes nothing on. Without a launcher, the parent may end (nohup)."""
    if launcher is not None:
        monkeypatch.setenv(launcher, "no")

    def launcher_ends(record):
        if record["step"] == 2:
            monkeypatch.setattr(os, "getppid", lambda: 1)

    result = train(config(), callbacks=[launcher_ends])
    ended = (4, "steps", 0) if launcher is None else (2, "interrupt", signal.SIGTERM)
    assert (result.step, result.reason, result.signal) == ended
    assert ckpt.read_trainer(result.checkpoint)["step"] == result.step


def test_signal_handlers_come_back(config):
    before = signal.getsignal(signal.SIGINT)
    train(config("optim.steps=1"), callbacks=[stop_at(1)])
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture
def pictures(tmp_path):
    """A function that makes a folder with class folders of these names."""
    count = itertools.count()

    def make(*classes):
        folder = tmp_path / f"pictures-{next(count)}"
        for name in classes:
            (folder / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / name / f"{i}.png")
        return folder

    return make


CHANGED_CLASSES = {
    # classes of the data: what the error says
    ("bird", "cat", "dog", "fox"): "with 'bird', so label 0 was 'cat' and would be 'bird'",
    ("cat", "dog", "fox", "wolf"): "with 'wolf', so label 3 was None and would be 'wolf'",
    ("cat", "fox"): "without 'dog', so label 1 was 'dog' and would be 'fox'",
    ("cat", "dog"): "without 'fox', so label 2 was 'fox' and would be None",
    ("Dog", "cat", "fox"): "without 'dog', with 'Dog', so label 0 was 'cat' and would be 'Dog'",
    (*"abcde", "cat", "dog", "fox"): "with 'a', 'b', 'c', and 2 more, so label 0",
}


def test_a_run_does_not_go_on_with_other_classes(config, pictures, tmp_path):
    data = config("optim.steps=1", "model.num_classes=9", "data.kind=folder", "data.size=8", "run.checkpoint_every=1")
    run = train(override(data, {"data.path": str(pictures("cat", "dog", "fox"))})).log.parent
    before = {path: path.read_bytes() for path in run.glob("*.*") if path.is_file()}
    for classes, message in CHANGED_CLASSES.items():
        changed = override(data, {"data.path": str(pictures(*classes)), "optim.steps": 2})
        with pytest.raises(ValueError, match=rf"^the data has other classes than {run}: {message}"):
            train(changed, resume=run)
    assert {path: path.read_bytes() for path in before} == before
    same = override(data, {"data.path": str(pictures("fox", "dog", "cat")), "optim.steps": 2})
    assert train(same, resume=run).step == 2


def test_a_run_goes_on_where_no_label_changes(config, pictures, archive, tmp_path):
    """The classes of an archive have no names, a single class has that of a folder, old checkpoints have none."""
    more = tmp_path / "more.npz"
    with np.load(archive) as arrays:
        np.savez(more, images=arrays["images"], labels=arrays["labels"] + 1)
    folder = ["data.kind=folder", "data.size=8"]
    for name, options, before, after in (
        ("counted", ["model.num_classes=4"], archive, more),
        ("one", folder, pictures("cat") / "cat", pictures("dog") / "dog"),
        ("old", folder, pictures("ant", "cat"), pictures("cat", "dog")),
    ):
        settings = config("optim.steps=1", *options, f"data.path={before}", out=name)
        saved = train(settings).checkpoint
        if name == "old":
            for file in (saved / ckpt.MODEL_FILE, saved / ckpt.EMA_FILE):
                metadata = ckpt.read_metadata(file)
                del metadata["class_names"]
                save_file(load_file(file), file, metadata)
        assert train(override(settings, ["optim.steps=2", f"data.path={after}"]), resume=tmp_path / name).step == 2


# --- refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.name=DC-DiT-M"], "unknown preset 'DC-DiT-M'; accepted: DC-DiT-S"),
        (["model.overrides.widht=3"], "unknown key 'widht' in DCDiTConfig"),
        (["router.group_size=3"], r"router\.group_size is 3; accepted: a divisor of the 4 .* pass, or null$"),
        (
            ["router.group_size=4", "optim.accumulate=2"],
            r"router\.group_size is 4; accepted: a divisor of the 2 .* pass$",
        ),
        (
            ["router.group_size=null", "optim.accumulate=2"],
            r"router\.group_size is null; accepted: a divisor of the 2 ",
        ),
        (
            ["model.overrides.router=uniform"],
            r"router\.target is 2; accepted with the uniform router: 4, for it keeps one position in 4 whatever",
        ),
        (["optim.accumulate=3"], r"optim\.batch_size is 4; accepted: a multiple of .* = 3"),
        (["optim.accumulate=8"], r"optim\.batch_size is 4; accepted: a multiple of .* = 8"),
        (["model.overrides.grid=[4, 4]"], r"the data has shape \(3, 8, 8\), the model takes \(3, 4, 4\)"),
        (["optim.shard=true", "optim.compile=true"], r"optim\.shard and optim\.compile are both true; accepted: one"),
        (["model.num_classes=2"], r"the data has 3 classes; model\.num_classes is 2"),
        (["data.kind=folder", "data.path=null"], r"data\.path is null"),
    ],
)
def test_misfits(config, overrides, message):
    with pytest.raises(ValueError, match=message) as error:
        train(config(*overrides))
    assert "\n" not in str(error.value)


def test_an_existing_run_is_not_overwritten(config):
    train(config("optim.steps=1"))
    with pytest.raises(ValueError, match=r"already holds a run; resume it \(--resume "):
        train(config())


@pytest.mark.parametrize("change", ["missing", "one number", "unknown"])
def test_averages_are_those_of_the_weights(config, change):
    """A single number would be spread over all of a weight."""
    first = train(config("optim.steps=1"))
    file, name = first.checkpoint / ckpt.EMA_FILE, "blocks.0.qkv.bias"
    with safe_open(file, framework="pt") as read:
        metadata, tensors = read.metadata(), {key: read.get_tensor(key) for key in read.keys()}  # noqa: SIM118
    weight = tensors.pop(name)
    changed = {
        "missing": {},
        "one number": {name: weight[:1].clone()},
        "unknown": {name: weight, "more": weight.clone()},
    }
    save_file({**tensors, **changed[change]}, file, metadata)
    message = {
        "missing": r"ema\.safetensors lacks weight 'blocks\.0\.qkv\.bias'",
        "one number": r"ema\.safetensors: blocks\.0\.qkv\.bias has shape \[1\], the model's is \[384\]",
        "unknown": r"ema\.safetensors has the unknown weight 'more'",
    }
    with pytest.raises(ValueError, match=message[change]):
        train(config("optim.steps=2"), resume=first.checkpoint)


def test_resume_of_another_architecture(config):
    saved = train(config("optim.steps=1")).checkpoint
    with pytest.raises(ValueError, match="holds a DCDiT; accepted: a DiT, as the configuration says"):
        train(config("model.name=DiT-S/2"), resume=saved)
    with pytest.raises(ValueError, match=r"lacks weight 'blocks\.1\."):
        train(config("model.overrides.depth=2"), resume=saved)


# --- training that diverges -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.name=DiT-S/2"], "the loss is nan at step 4;"),
        (["model.name=DiT-S/2", "run.log_every=50"], "the loss is nan at step 4;"),
        (["model.name=DiT-S/2", "run.log_every=50", "run.eval_every=5"], "the loss is nan at step 4;"),
        (["run.log_every=50"], "the router's probabilities are not finite at step 4;"),
    ],
)
def test_a_run_that_diverges_keeps_its_good_checkpoints(config, overrides, message):
    """Step 3 gets an enormous learning rate. Nothing that is not finite is saved or logged, and the run can go on."""
    settings = config(*overrides, "run.checkpoint_every=2", "run.keep_checkpoints=1", "optim.steps=2")
    good = train(settings)
    settings.optim.steps, settings.optim.lr = 20, 1e30
    with pytest.raises(FloatingPointError, match=f"^{message} lower optim.lr or check the data$"):
        train(settings, resume=settings.run.out)
    assert ckpt.list_checkpoints(settings.run.out) == [good.checkpoint]
    assert all(np.isfinite(list(record.values())).all() for record in records(good))
    settings.optim.steps, settings.optim.lr = 4, 1e-3
    assert train(settings, resume=settings.run.out).step == 4


def spoil_gradient(optimizer, ema):
    optimizer.param_groups[0]["params"][-1].register_hook(lambda grad: grad * torch.nan)


def spoil_weights(optimizer, ema):
    optimizer.param_groups[0]["params"][-1].data.view(-1)[0] = torch.inf


def spoil_averages(optimizer, ema):
    ema.state["x_embedder.bias"][0] = torch.nan


def spoil_moments(optimizer, ema):
    optimizer.state[optimizer.param_groups[0]["params"][-1]]["exp_avg_sq"].view(-1)[0] = torch.inf


@pytest.mark.parametrize(
    ("spoil", "step", "message"),
    [
        (spoil_gradient, 2, "the gradient norm is nan at step 3;"),
        (spoil_weights, 3, "the weights are not finite at step 3;"),
        (spoil_averages, 3, "the averaged weights are not finite at step 3;"),
        (spoil_moments, 3, "the moments of the optimiser are not finite at step 3;"),
    ],
)
def test_what_diverged_is_named_before_it_is_saved(config, monkeypatch, spoil, step, message):
    """Between two records, in the step after a checkpoint."""
    optimizers, steps, update = [], itertools.count(1), EMA.update

    def spoiled_update(self):
        update(self)
        if next(steps) == step:
            spoil(optimizers[0], self)

    hook = register_optimizer_step_post_hook(lambda optimizer, *arguments: optimizers.append(optimizer))
    monkeypatch.setattr(EMA, "update", spoiled_update)
    settings = config("run.log_every=50", "run.checkpoint_every=1", "run.keep_checkpoints=1")
    with pytest.raises(FloatingPointError, match=f"^{message}"):
        train(settings)
    hook.remove()
    assert ckpt.read_trainer(settings.run.out)["step"] == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [("DC-DiT-S", "the router's probabilities are not finite at step 1;"), ("DiT-S/2", "the loss is")],
)
def test_images_that_overflow(config, tmp_path, name, message):
    path = tmp_path / "huge.npz"
    np.savez(path, latents=np.full((8, 3, 8, 8), 3e38, np.float32), labels=np.zeros(8, int))
    with pytest.raises(FloatingPointError, match=message):
        train(override(config(f"model.name={name}"), {"data.path": str(path)}))
