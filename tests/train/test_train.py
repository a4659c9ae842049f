"""Whole runs of a tiny model on a CPU: what a step does, what a run writes, and the errors of what does not fit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.programs import environment
from support.runs import TINY, assert_same_weights, read_log, records, without_speed

from dcdit import checkpoint as ckpt
from dcdit.config import dump_yaml, override
from dcdit.data import NpzDataset, batches
from dcdit.diffusion import DiTObjective
from dcdit.models import create_model
from dcdit.ops import ratio_loss
from dcdit.train import EMA, train
from dcdit.train.schedule import NOISE, seed_of


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
        ["optim.precision=bf16", "model.overrides.router=dithered", "model.overrides.cell_context=true"],
    ],
    ids=["bf16", "accumulate", "flow", "h-net", "uniform", "dithered"],
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
    both = records(one), read_log(tmp_path / "two/log.jsonl")
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
    logs = {name: without_speed(read_log(tmp_path / name / "log.jsonl")) for name in ("run", "whole", "stopped")}
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
