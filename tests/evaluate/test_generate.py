"""Samples of a checkpoint: drawn by several processes, continued, put together, and what they cost."""

import dataclasses
import itertools
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from support.killing import dies_before
from support.small import small_dc_dit, small_dit, small_sparse_dit

from dcdit.checkpoint import load_model, save_model
from dcdit.diffusion import sample
from dcdit.evaluate.generate import SampleSettings, generate, weights_hash
from dcdit.models import count_flops
from dcdit.sample import drawing
from dcdit.sample.model_calls import call_times
from dcdit.sample.options import SamplingOptions
from dcdit.utils.images import to_pixels

PIXELS = {"in_channels": 3, "grid": (8, 8), "num_classes": 3, "hidden_size": 128, "num_heads": 2, "depth": 1}
CPU = torch.device("cpu")


PLAIN = SampleSettings(
    SamplingOptions(checkpoint="run", method="ddim", steps=3, seed=5, batch_size=2),
    weights="abc",
    num=7,
    drop="drop_0.5",
)


def draw(out, model=None, drop=0.5, rank=0, world=1, wait=lambda: None, **changes):
    model = model or small_dc_dit(**PIXELS)
    own = {name: changes.pop(name) for name in ("weights", "num") if name in changes}
    settings = dataclasses.replace(PLAIN, options=dataclasses.replace(PLAIN.options, **changes), **own)
    return generate(model, settings, drop, out, lambda x: x, device=CPU, rank=rank, world=world, wait=wait)


def draw_together(out, world):
    """That many processes; here they are threads."""
    wait = threading.Barrier(world).wait
    model = small_dc_dit(**PIXELS)
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(lambda rank: draw(out, model, rank=rank, world=world, wait=wait), range(world)))


def arrays(out):
    with np.load(out / "samples.npz") as archive:
        return archive["arr_0"], archive["arr_1"]


def test_images_are_those_of_sample(tmp_path):
    model = small_dc_dit(**PIXELS)
    draw(tmp_path, model)
    pixels, labels = arrays(tmp_path)
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    alone = sample(model, torch.tensor(labels), 3, "ddim", drop_fraction=0.5, clip=True, seed=5, progress=False)
    assert pixels.shape == (7, 8, 8, 3)
    assert np.abs(pixels.astype(int) - to_pixels(alone)).max() <= 1  # batches of two against one of seven
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples.npz", "sampling.json"]


def test_processes_share_the_batches(tmp_path):
    cost = draw(tmp_path / "one")
    assert draw_together(tmp_path / "three", 3) == [cost, None, None]
    for a, b in zip(arrays(tmp_path / "one"), arrays(tmp_path / "three"), strict=True):
        assert np.array_equal(a, b)


def test_a_killed_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    draw(tmp_path / "whole")
    drawn = []

    def watched(*args, **options):
        drawn.append(options["first_index"])
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return sample(*args, **options)

    monkeypatch.setattr(drawing, "sample", watched)
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path / "killed")
    assert not (tmp_path / "killed" / "samples.npz").exists()
    cost = draw(tmp_path / "killed")
    assert drawn == [0, 2, 4, 4, 6]
    for a, b in zip(arrays(tmp_path / "whole"), arrays(tmp_path / "killed"), strict=True):
        assert np.array_equal(a, b)
    assert draw(tmp_path / "killed") == cost and len(drawn) == 5  # finished: nothing is drawn


def test_missing_batches_are_shared_too(tmp_path, monkeypatch):
    draw(tmp_path / "whole")
    drawn = []

    def watched(*args, **options):
        drawn.append(options["first_index"])
        return sample(*args, **options)

    monkeypatch.setattr(drawing, "sample", watched)
    draw(tmp_path / "part", rank=1, world=2)
    assert drawn == [2, 6]
    draw_together(tmp_path / "part", 2)
    assert sorted(drawn[2:]) == [0, 4]
    for a, b in zip(arrays(tmp_path / "whole"), arrays(tmp_path / "part"), strict=True):
        assert np.array_equal(a, b)


def test_images_of_other_settings_are_never_mixed(tmp_path, monkeypatch):
    def stops(*args, first_index, **options):
        if first_index:
            raise KeyboardInterrupt
        return sample(*args, first_index=first_index, **options)

    monkeypatch.setattr(drawing, "sample", stops)
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path)
    with pytest.raises(ValueError, match=r"000000\.npz is of other settings: steps was 3 and is 4"):
        draw(tmp_path, steps=4)
    monkeypatch.undo()
    draw(tmp_path)
    with pytest.raises(ValueError, match=r"sampling\.json is of other settings: weights was 'abc' and is 'abd'"):
        draw(tmp_path, weights="abd")


# --- files of somebody else -------------------------------------------------------------------------------------------


def test_only_the_batches_that_were_drawn_are_removed(tmp_path):
    (tmp_path / "batches").mkdir()
    np.savez(tmp_path / "batches" / "999.npz", mine=[1])
    (tmp_path / "batches" / "notes.txt").write_text("mine")
    draw(tmp_path)
    assert sorted(path.name for path in (tmp_path / "batches").iterdir()) == ["999.npz", "notes.txt"]
    draw(tmp_path)
    assert sorted(path.name for path in (tmp_path / "batches").iterdir()) == ["999.npz", "notes.txt"]


@pytest.mark.parametrize("content", [b"", b"mine", "an array", "another archive"])
def test_a_batch_file_of_somebody_else_is_refused(tmp_path, content):
    file = tmp_path / "batches" / "000001.npz"
    file.parent.mkdir()
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content == "an array":
        np.save(file.open("wb"), np.zeros(3))
    else:
        np.savez(file, images=np.zeros(3))
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"000001\.npz is no batch of dcdit evaluate \([^\n]+\); accepted: "):
        draw(tmp_path)
    assert file.read_bytes() == before and [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_batch_file_of_somebody_else_survives_beside_a_finished_set(tmp_path):
    cost = draw(tmp_path)
    (tmp_path / "batches").mkdir()
    (tmp_path / "batches" / "000001.npz").write_bytes(b"mine")
    assert draw(tmp_path) == cost
    assert (tmp_path / "batches" / "000001.npz").read_bytes() == b"mine"


def test_samples_of_somebody_else_are_refused(tmp_path):
    (tmp_path / "samples.npz").write_bytes(b"mine")
    with pytest.raises(
        ValueError, match=r"samples\.npz is there without sampling\.json and would be replaced; choose "
    ):
        draw(tmp_path)
    for text in ("", "{}", "[]", '{"settings": 3, "work": {}}', '{"settings": {}, "work": {"a": 1}}'):
        (tmp_path / "sampling.json").write_text(text)
        with pytest.raises(ValueError, match=r"sampling\.json is not of dcdit evaluate \(.+\); choose another --out$"):
            draw(tmp_path)
    assert (tmp_path / "samples.npz").read_bytes() == b"mine"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_kill_at_any_moment_of_putting_the_file_together(tmp_path):
    """The same call ends with the same images, and nothing is left of the killed one."""
    draw(tmp_path / "whole")
    draw(tmp_path / "part", rank=1, world=2)
    with pytest.raises(FileNotFoundError, match="run the same command again"):
        draw(tmp_path / "part", rank=0, world=3)
    model, kills = small_dc_dit(**PIXELS), 0
    for number in itertools.count(0, 7):
        shutil.copytree(tmp_path / "part", tmp_path / "out")
        killed = dies_before(number, lambda: draw(tmp_path / "out", model))
        draw(tmp_path / "out", model)
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["samples.npz", "sampling.json"]
        for a, b in zip(arrays(tmp_path / "whole"), arrays(tmp_path / "out"), strict=True):
            assert np.array_equal(a, b)
        shutil.rmtree(tmp_path / "out")
        kills += killed
        if not killed:
            break
    assert kills > 5


# --- folders of earlier versions --------------------------------------------------------------------------------------


OLD_FOLDER = {
    "settings": {
        "checkpoint": "run",
        "weights": "abc",
        "num": 2,
        "steps": 1,
        "method": "ddim",
        "drop": "drop_0.5",
        "null_drop_fraction": 0.9,
        "budget": None,
        "cfg_scale": 2.0,
        "cfg_interval": [0.1, 0.7],
        "seed": 5,
        "batch_size": 2,
        "precision": "fp32",
        "vae": None,
        "noise": "philox",
    },
    "work": {
        "tflops": 2.7821414e-05,
        "tflops_null": 0.0,
        "kept": 0.1875,
        "calls": [{"t": 0.0, "gflops": 0.027821414, "kept": 0.1875, "natural": 0.375}],
    },
}
"""The sampling.json of an earlier version."""


def test_a_folder_of_an_earlier_version_is_recognised(tmp_path, monkeypatch):
    options = {"num": 2, "steps": 1, "null_drop_fraction": 0.9, "cfg_scale": 2.0, "cfg_interval": (0.1, 0.7)}
    draw(tmp_path / "new", **options)
    new = json.loads((tmp_path / "new" / "sampling.json").read_text())
    assert new["settings"].pop("capacity") is None, "which came later"
    assert json.dumps(new["settings"]) == json.dumps(OLD_FOLDER["settings"]), "the same names in the same order"
    assert new["work"].pop("overflow") is None
    assert new["work"].keys() == OLD_FOLDER["work"].keys()

    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "sampling.json").write_text(json.dumps(OLD_FOLDER))
    (tmp_path / "old" / "samples.npz").write_bytes(b"")
    monkeypatch.setattr(drawing, "sample", None)  # nothing is drawn
    assert dataclasses.asdict(draw(tmp_path / "old", **options)) == {**OLD_FOLDER["work"], "overflow": None}
    with pytest.raises(ValueError, match=r"is of other settings: cfg_interval was \[0.1, 0.7\] and is \[0.1, 0.8\]"):
        draw(tmp_path / "old", **{**options, "cfg_interval": (0.1, 0.8)})
    # Before noise came from a counter, the same seed drew other images.
    older = {**OLD_FOLDER, "settings": {k: v for k, v in OLD_FOLDER["settings"].items() if k != "noise"}}
    (tmp_path / "old" / "sampling.json").write_text(json.dumps(older))
    with pytest.raises(ValueError, match="is of other settings: noise was None and is 'philox'"):
        draw(tmp_path / "old", **options)


def test_a_missing_batch_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"000001\.npz'; run the same command again"):
        draw(tmp_path, rank=0, world=2)  # the other process is dead


# --- what it costs ------------------------------------------------------------------------------------------------


def test_cost_of_a_dynamic_model_is_that_of_the_tokens_it_kept(tmp_path):
    model = small_dc_dit(**PIXELS)
    cost = draw(tmp_path, model, num=3, batch_size=3, cfg_scale=2.0, null_drop_fraction=0.9)
    lengths = []

    def watched(x, t, y, drop_fraction):
        out, routing = model(x, t, y, drop_fraction=drop_fraction, return_routing=True)
        lengths.append(routing.selection.lengths.tolist())
        return out

    labels = torch.tensor([0, 1, 2])
    options = {"drop_fraction": (0.5, 0.9), "cfg_scale": 2.0, "shape": (3, 8, 8), "null_class": 3, "progress": False}
    sample(watched, labels, 3, "ddim", clip=True, seed=5, **options)
    assert all(len(call) == 6 for call in lengths) and len(lengths) == 3
    total = sum(count_flops(model.config, call)["total"] for call in lengths) / 3 / 1e12
    null = sum(count_flops(model.config, call[3:])["total"] for call in lengths) / 3 / 1e12
    assert cost.tflops == pytest.approx(total) and cost.tflops_null == pytest.approx(null)
    assert cost.kept == pytest.approx(np.mean([call[:3] for call in lengths]) / 64)
    assert json.loads((tmp_path / "sampling.json").read_text())["work"]["tflops"] == cost.tflops


def test_tokens_lost_to_a_capacity_are_counted(tmp_path):
    """Over batches, the last of which is smaller, and after a second look at the finished folder."""
    model, lost = small_dc_dit(**PIXELS), []

    def watched(x, t, y, drop_fraction, capacity):
        out, routing = model(x, t, y, drop_fraction=drop_fraction, capacity=capacity, return_routing=True)
        lost.append(int(routing.selection.overflow))
        return out

    options = {"clip": True, "seed": 5, "shape": (3, 8, 8), "progress": False}
    for start, labels in enumerate(torch.tensor([0, 1, 2]).split(2)):
        sample(watched, labels, 3, "ddim", drop_fraction=0.5, capacity=10, first_index=2 * start, **options)
    assert all(count > 0 for count in lost[:3])
    for _ in range(2):
        cost = draw(tmp_path, model, num=3, capacity=10)
        assert cost.overflow == pytest.approx(sum(lost) / 3)
    with pytest.raises(ValueError, match="is of other settings: capacity was 10 and is None"):
        draw(tmp_path, model, num=3)


def test_cost_of_a_static_model_is_that_of_every_call(tmp_path):
    model = small_dit(**PIXELS, patch_size=2)
    cost = draw(tmp_path, model, drop=None, method="heun")
    calls = len(cost.calls)
    assert calls in (5, 6)  # Heun calls twice per step, once in the last
    assert cost.tflops == pytest.approx(calls * count_flops(model.config)["total"] / 1e12)
    assert cost.kept is None and cost.tflops_null == 0


def test_cost_of_sparse_tokens_is_that_of_each_timestep(tmp_path):
    sizes = {"in_channels": 3, "grid": (8, 8), "num_classes": 3, "noisy_grid": (1, 2)}
    model = small_sparse_dit(**sizes, router="predictability")
    cost = draw(tmp_path, model, drop=None, steps=6)
    tokens = [model.config.sparse_tokens_at(t) for t in call_times("ddim", 6)]
    assert len(set(tokens)) > 2
    assert cost.tflops == pytest.approx(sum(count_flops(model.config, few)["total"] for few in tokens) / 1e12)


def test_weights_hash_is_of_what_load_model_reads(tmp_path):
    model = small_dc_dit(**PIXELS)
    folder = tmp_path / "checkpoints" / "step_00000001"
    folder.mkdir(parents=True)
    save_model(folder / "model.safetensors", model)
    save_model(folder / "ema.safetensors", model, {name: value * 2 for name, value in model.state_dict().items()})
    hashes = {weights_hash(tmp_path, ema) for ema in (True, False)}
    assert len(hashes) == 2
    assert weights_hash(folder / "ema.safetensors", False) == weights_hash(tmp_path, True)
    assert load_model(tmp_path, ema=True).config == model.config
