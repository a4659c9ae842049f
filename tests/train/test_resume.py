"""Limits of a run and going on after one: exact, with the checkpoint asked for, and refused where it does not fit."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.runs import TINY, assert_same_weights, records, stop_at, without_speed

from dcdit import checkpoint as ckpt
from dcdit import ops
from dcdit.config import override
from dcdit.models import count_flops, create_model
from dcdit.train import train


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
    assert without_speed(records(whole)) == without_speed(records(second))


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


def test_time_limit(config):
    result = train(config("run.minutes=1e-9", "optim.steps=1000"))
    assert (result.step, result.reason) == (1, "minutes")
    assert ckpt.read_trainer(result.checkpoint)["step"] == 1


def test_old_checkpoints_go(config):
    result = train(config("run.checkpoint_every=1", "run.keep_checkpoints=2"))
    assert [path.name for path in ckpt.list_checkpoints(result.log.parent)] == ["step_00000003", "step_00000004"]


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
