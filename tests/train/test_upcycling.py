"""Whole upcycling runs of a tiny model: what is frozen, what the warm-up does, resuming, the command, refusals."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.runs import assert_same_weights, records, stop_at

from dcdit import checkpoint as ckpt
from dcdit.cli import main
from dcdit.config import dump_yaml, override
from dcdit.models import count_flops, create_config, to_dit
from dcdit.train import train

TINY = {"in_channels": 3, "grid": [8, 8], "hidden_size": 128, "depth": 2, "num_heads": 2}
FROZEN = ("t_embedder.", "y_embedder.")


def settings(archive, out, model, *overrides):
    data = {
        "model": {"name": model, "num_classes": 3, "overrides": TINY},
        "data": {"kind": "npz", "path": str(archive), "held_out": 0.25},
        "diffusion": {"objective": "flow"},
        "optim": {"steps": 4, "batch_size": 4, "lr": 1e-3, "ema_decay": 0.9, "device": "cpu"},
        "router": {"group_size": 2, "drop_warmup_steps": 99},
        "run": {"out": str(out), "log_every": 1, "eval_every": 0, "eval_images": 3},
    }
    return override(data, overrides)


@pytest.fixture(scope="module")
def source(archive, tmp_path_factory):
    """The run folder of a static DiT."""
    out = tmp_path_factory.mktemp("source") / "dit"
    train(settings(archive, out, "DiT-S/2", "optim.steps=30"))
    return out


@pytest.fixture
def config(archive, source, tmp_path):
    def config(*overrides, out="run"):
        upcycled = {"upcycle.source": str(source), "upcycle.distill_steps": 2}
        upcycled["model.overrides.adapt_conditioning"] = True
        return override(override(settings(archive, tmp_path / out, "DC-DiT-S"), upcycled), overrides)

    return config


# --- what a run does ----------------------------------------------------------------------------------------------


def test_a_run_begins_with_the_source(config, source):
    """At learning rate 0, what is saved is what training began with."""
    saved = ckpt.load_checkpoint(train(config("optim.lr=0", "optim.steps=1")).checkpoint)
    dit = ckpt.load_model(source).state_dict()
    copied = [name for name in saved.model if name.startswith(("blocks.", "modulation.", *FROZEN))]
    assert len(copied) > 20
    for name in copied:
        assert torch.equal(saved.model[name], dit[name]) and torch.equal(saved.ema[name], dit[name]), name


def test_embedders_stay_and_the_rest_learns(config, source):
    saved = ckpt.load_checkpoint(train(config()).checkpoint)
    dit = ckpt.load_model(source).state_dict()
    for name, tensor in saved.model.items():
        if name.startswith(FROZEN):
            assert torch.equal(tensor, dit[name]) and torch.equal(saved.ema[name], dit[name]), name
    moved = ("blocks.0.qkv.weight", "modulation.linear.weight")
    assert not any(torch.equal(saved.model[name], dit[name]) for name in moved)
    assert not torch.equal(saved.model["cond_adaptor.weight"], torch.ones(128))


def test_optimiser_state_is_of_what_learns(config):
    saved = ckpt.load_checkpoint(train(config()).checkpoint)
    buffers = {"pos_embed"}
    learning = {name for name in saved.model if not name.startswith(FROZEN)} - buffers
    assert {key.rpartition("/")[0] for key in saved.optimizer} == learning
    for name in learning:
        assert saved.optimizer[f"{name}/exp_avg"].shape == saved.model[name].shape


def test_records_of_the_warm_up(config):
    warm, after = ["optim.steps=5", "run.log_every=4", "upcycle.distill_steps=3"], []
    for record in records(train(config(*warm, "upcycle.distill_weight=0.5"))):
        total = record["diffusion_loss"] + 0.03 * record["ratio_loss"] + 0.5 * record.get("distill_loss", 0)
        assert record["loss"] == pytest.approx(total, rel=1e-5)
        after.append((record["step"], "distill_loss" in record))
    # A record ends the warm-up, so no record mixes steps with and without a teacher.
    assert after == [(3, True), (4, False), (5, False)]


def test_the_teacher_is_counted(config):
    with_teacher, without = (
        train(override(config("optim.lr=0", out=str(steps)), {"upcycle.distill_steps": steps})) for steps in (3, 0)
    )
    dit = count_flops(create_config("DiT-S/2", num_classes=3, **TINY))["total"]
    assert records(with_teacher)[-1]["flops"] - records(without)[-1]["flops"] == 3 * 4 * dit


def test_the_distillation_loss_falls(config):
    steps = ["optim.steps=50", "upcycle.distill_steps=50", "optim.lr=3e-3", "data.flip=false"]
    losses = [record["distill_loss"] for record in records(train(config(*steps)))]
    assert np.mean(losses[-5:]) < 0.5 * losses[0]


def test_no_warm_up(config):
    assert not any("distill_loss" in record for record in records(train(config("upcycle.distill_steps=0"))))


@pytest.mark.parametrize("overrides", [["optim.precision=bf16"], ["optim.accumulate=2"]], ids=["bf16", "accumulate"])
def test_variants(config, overrides):
    found = records(train(config(*overrides)))
    assert all(np.isfinite(list(record.values())).all() for record in found)
    assert "distill_loss" in found[0]


def test_an_upcycled_model_samples(config, capsys, tmp_path):
    result = train(config())
    command = ["sample", "--checkpoint", str(result.checkpoint), "--steps", "2", "--out", str(tmp_path / "pictures")]
    assert main(command) == 0, capsys.readouterr().err


def test_two_processes_equal_two_passes_of_one(config, tmp_path):
    train(config("optim.accumulate=2", out="single"))
    (tmp_path / "two.yaml").write_text(dump_yaml(config(out="two")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "dcdit", "train", "--config", str(tmp_path / "two.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    one, two = (ckpt.load_checkpoint(tmp_path / name) for name in ("single", "two"))
    for name in one.model:
        torch.testing.assert_close(two.model[name], one.model[name], rtol=1e-5, atol=1e-6, msg=name)


# --- resuming -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 2, 3], ids=["within", "at the end of", "after"])
def test_resumed_run_is_bitwise_the_uninterrupted_one(config, step):
    """Stopped within, at the end of, or after the warm-up."""
    whole = train(config(out="whole"))
    first = train(config(out="stopped"), callbacks=[stop_at(step)])
    assert (first.step, first.reason) == (step, "interrupt")
    second = train(config(out="stopped"), resume=first.log.parent)
    assert_same_weights(whole.checkpoint, second.checkpoint)
    assert [("distill_loss" in record) for record in records(second)] == [True, True, False, False]


def test_the_source_is_needed_for_the_warm_up_only(config, source, tmp_path):
    own = shutil.copytree(source, tmp_path / "copy")

    def moved(steps, distill_steps):
        values = {"upcycle.source": str(own), "optim.steps": steps, "upcycle.distill_steps": distill_steps}
        return override(config(out=str(distill_steps)), values)

    early, late = (train(moved(2, distill_steps)) for distill_steps in (9, 2))
    shutil.rmtree(own)
    with pytest.raises(FileNotFoundError, match="no pretrained DiT"):
        train(moved(3, 9), resume=early.log.parent)
    assert train(moved(3, 2), resume=late.log.parent).step == 3


# --- the command --------------------------------------------------------------------------------------------------


def command(archive, source, out, *extra):
    sets = ["data.kind=npz", f"data.path={archive}", "data.held_out=0", "router.group_size=null", "optim.device=cpu"]
    flags = ["--from", str(source), "--steps", "2", "--batch-size", "4", "--out", str(out)]
    return ["upcycle", *flags, *(word for item in sets for word in ("--set", item)), *extra]


def test_command_takes_the_transformer_from_the_source(archive, source, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(command(archive, source, out)) == 0, capsys.readouterr().err
    model, dit = ckpt.load_model(out), ckpt.load_model(source)
    shared = ("grid", "in_channels", "hidden_size", "depth", "num_heads", "mlp_ratio", "num_classes", "learn_sigma")
    assert all(getattr(model.config, name) == getattr(dit.config, name) for name in shared)
    assert model.config.adapt_conditioning
    trainer = ckpt.read_trainer(out)["config"]
    assert trainer["upcycle"]["source"] == str(source) and trainer["diffusion"]["objective"] == "flow"
    for resumed in ("upcycle", "train"):
        assert main([resumed, "--resume", str(out), "--steps", "3"]) == 0, capsys.readouterr().err
    assert ckpt.read_trainer(out)["step"] == 3


def test_command_keeps_what_the_user_says(archive, source, tmp_path, capsys):
    (tmp_path / "own.yaml").write_text("model:\n  overrides: {adapt_conditioning: false, router: cosine2d}\n")
    file = ["--config", str(tmp_path / "own.yaml"), "--set", "model.overrides.learn_sigma=false"]
    assert main(command(archive, source, tmp_path / "run", *file)) == 0, capsys.readouterr().err
    config = ckpt.load_model(tmp_path / "run").config
    assert (config.adapt_conditioning, config.router, config.learn_sigma) == (False, "cosine2d", False)


def test_command_with_a_state_dict(archive, source, tmp_path, capsys):
    save_file(to_dit(ckpt.load_model(source)), tmp_path / "DiT.safetensors")
    flags = ["--num-heads", "2", "--set", "diffusion.objective=flow"]
    assert main(command(archive, tmp_path / "DiT.safetensors", tmp_path / "run", *flags)) == 0, capsys.readouterr().err
    assert ckpt.load_model(tmp_path / "run").config.num_heads == 2


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--set", "model.overrides.depth=3"], "the pretrained DiT has depth 2, the DC-DiT 3"),
        (["--set", "model.overrides.hidden_size=256"], "hidden_size 128, the DC-DiT 256"),
        (["--set", "model.overrides.num_heads=4"], "num_heads 2, the DC-DiT 4"),
        (["--set", "model.num_classes=5"], "4 rows of labels"),
        (["--set", "diffusion.objective=dit"], "diffusion.objective is 'dit'; accepted: 'flow', that of"),
        (["--resume", "runs/x"], "give --from to start, or --resume"),
        (["--from", "nowhere.pt"], "no pretrained DiT 'nowhere.pt'"),
        (["--set", "model=3"], "model"),
        (["--set", "upcycle.distil_steps=3"], "unknown configuration key 'upcycle.distil_steps'"),
    ],
)
def test_command_refuses(archive, source, tmp_path, capsys, extra, message):
    assert main(command(archive, source, tmp_path / "run", *extra)) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("dcdit: error: ") and message in err


def test_a_source_without_a_null_class(archive, tmp_path, capsys):
    dit = tmp_path / "dit"
    train(settings(archive, dit, "DiT-S/2", "optim.steps=1", "model.overrides.class_dropout_prob=0"))
    assert main(command(archive, dit, tmp_path / "run")) == 2
    assert "no null class beside its 3 labels" in capsys.readouterr().err
    unguided = ["--set", "model.overrides.class_dropout_prob=0"]
    assert main(command(archive, dit, tmp_path / "run", *unguided)) == 0


def test_a_static_model_cannot_be_upcycled(archive, source, tmp_path):
    with pytest.raises(ValueError, match=r"model\.name is 'DiT-S/2' with upcycle\.source; accepted: a DC-DiT"):
        train(override(settings(archive, tmp_path / "run", "DiT-S/2"), {"upcycle.source": str(source)}))
