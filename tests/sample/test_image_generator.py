"""``dcdit.load``: from a path to pictures."""

import json
import re
import shutil
import subprocess
import sys
from functools import partial

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from support.autoencoder import save_autoencoder
from support.small import small_dc_dit, small_dit

import dcdit
from dcdit import checkpoint as ckpt
from dcdit.diffusion import sample
from dcdit.models import to_official
from dcdit.sample import BoundaryMap
from dcdit.sample.model_calls import call_times
from dcdit.utils.images import to_pixels

NAMES = ("bird", "cat", "dog")
PIXELS = {"grid": (8, 8), "in_channels": 3, "num_classes": 3}
QUICK = {"num_steps": 2, "progress": False}


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory):
    path = tmp_path_factory.mktemp("dynamic") / "model.safetensors"
    model = small_dc_dit(**PIXELS)
    model.objective = "flow"
    ckpt.save_model(path, model, notes={"class_names": json.dumps(NAMES)})
    return path


def save_run(path, model):
    """A run folder with one checkpoint, whose averaged weights are those of the model."""
    optimizer = torch.optim.AdamW(model.parameters())
    other = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    folder = ckpt.checkpoint_path(path, 1)
    ckpt.save_checkpoint(folder, model, model.state_dict(), optimizer, {"step": 1}, state=other)
    return folder


def test_pictures_are_those_of_sample(dynamic):
    """Names and numbers mix, batches change nothing, and the method is that of the objective."""
    generator = dcdit.load(dynamic, device="cpu")
    images = generator.generate(["cat", 2, "bird"], drop_fraction=0.3, cfg_scale=1.5, seed=4, batch_size=2, **QUICK)
    model, labels = ckpt.load_model(dynamic), torch.tensor([1, 2, 0])
    expected = sample(model, labels, 2, "heun", cfg_scale=1.5, drop_fraction=0.3, seed=4, progress=False)
    assert [image.size for image in images] == [(8, 8)] * 3 and images[0].mode == "RGB"
    difference = np.stack([np.asarray(image) for image in images]).astype(int) - to_pixels(expected)
    assert abs(difference).max() <= 1  # batches of another size round otherwise
    assert repr(generator) == f"<DCDiT of {dynamic}: 3 classes, 3 x 8 x 8, on cpu>"


def test_a_scheduler_of_diffusers(dynamic):
    """In place of a method, with maps of the same calls; batches change nothing."""
    generator, scheduler = dcdit.load(dynamic, device="cpu"), diffusers.FlowMatchEulerDiscreteScheduler()
    options = {"cfg_scale": 1.5, "seed": 4, "batch_size": 2, "output_type": "latent", **QUICK}
    images, maps = generator.generate(["cat", 2, "bird"], scheduler=scheduler, return_maps=True, **options)
    ours = generator.generate(["cat", 2, "bird"], method="euler", **options)
    torch.testing.assert_close(images, ours, rtol=1e-4, atol=1e-4)
    assert [seen.t for seen in maps[2]] == pytest.approx([1000, 500])
    with pytest.raises(ValueError, match="method is given beside a scheduler"):
        generator.generate(["cat"], scheduler=scheduler, method="euler", **QUICK)
    with pytest.raises(ValueError, match="graph is given beside a scheduler"):
        generator.generate(["cat"], scheduler=scheduler, graph=True, **QUICK)


def test_a_method_that_does_not_fit_names_the_model(dynamic):
    with pytest.raises(ValueError, match="DCDiT was trained with the objective 'flow', which the method 'ddim'"):
        dcdit.load(dynamic, device="cpu").generate(1, method="ddim", **QUICK)


@pytest.mark.parametrize("labels", [1, "cat", [1], torch.tensor([1]), np.array([1]), (np.int64(1),)])
def test_forms_of_labels(dynamic, labels):
    assert dcdit.load(dynamic, device="cpu").labels(labels) == [1]


def test_every_kind_of_path(tmp_path, dynamic):
    model = small_dc_dit(**PIXELS)
    checkpoint = save_run(tmp_path / "run", model)
    published = tmp_path / "published"
    published.mkdir()
    ckpt.save_model(published / "diffusion.safetensors", model)
    for path in (tmp_path / "run", checkpoint, checkpoint / "ema.safetensors", published, str(dynamic)):
        loaded = dcdit.load(path, device="cpu").model.state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items()), path
    last = dcdit.load(tmp_path / "run", device="cpu", ema=False).model
    assert torch.equal(last.x_embedder.bias, model.x_embedder.bias + 1)
    assert dcdit.load(published, device="cpu", precision="bf16").model.x_embedder.bias.dtype == torch.bfloat16
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "optimizer.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):  # damaged, not a published model
        dcdit.load(checkpoint)


def test_a_file_of_the_reference_implementation(tmp_path):
    model = small_dc_dit(grid=(8, 8), hidden_size=384, num_heads=6, depth=1)
    torch.save(to_official(model), tmp_path / "official.pt")
    generator = dcdit.load(tmp_path / "official.pt", device="cpu")
    x = generator.generate(3, output_type="latent", **QUICK)
    assert x.shape == (1, 4, 8, 8)
    expected = sample(model, torch.tensor([3]), 2, "ddpm", drop_fraction=0.0, progress=False)
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


def test_a_snapshot_of_the_hub(tmp_path, dynamic, monkeypatch):
    """A repository in the cache of huggingface_hub needs no network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--somebody--birds"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    shutil.copy(dynamic, snapshot / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for revision in (None, commit):
        assert dcdit.load("somebody/birds", device="cpu", revision=revision).class_names == NAMES
    with pytest.raises(FileNotFoundError, match=r"no path 'somebody/cats', and not to be had from the Hub: .+"):
        dcdit.load("somebody/cats")


def test_latents_need_an_autoencoder(tmp_path):
    """It is found beside the weights and in the run of a checkpoint, or given."""
    model = small_dc_dit(grid=(8, 8))
    checkpoint = save_run(tmp_path / "run", model)
    bare = dcdit.load(tmp_path / "run", device="cpu")
    with pytest.raises(ValueError, match=r"makes latents of 4 channels; give dcdit[.]load the vae"):
        bare.generate([0], **QUICK)
    latents = bare.generate([0, 1], output_type="latent", **QUICK)
    (tmp_path / "elsewhere").mkdir()
    save_autoencoder(tmp_path / "elsewhere")
    given = dcdit.load(checkpoint, device="cpu", vae=tmp_path / "elsewhere")
    pixels = given.generate([0, 1], output_type="pt", **QUICK)
    assert latents.shape == (2, 4, 8, 8) and pixels.shape == (2, 3, 16, 16)
    shutil.move(tmp_path / "elsewhere", tmp_path / "run" / "vae")
    for path in (tmp_path / "run", checkpoint, checkpoint / "ema.safetensors"):
        found = dcdit.load(path, device="cpu")
        assert torch.equal(found.generate([0, 1], output_type="pt", **QUICK), pixels)
    assert found.generate([1], **QUICK)[0].size == (16, 16)


def test_maps_show_what_each_image_kept(dynamic):
    generator = dcdit.load(dynamic, device="cpu")
    options = {"drop_fraction": 0.4, "cfg_scale": 2.0, "batch_size": 2, "output_type": "pt", **QUICK}
    images, maps = generator.generate([0, 1, 2], return_maps=True, **options)
    assert torch.equal(images, generator.generate([0, 1, 2], **options))
    assert [[seen.t for seen in image] for image in maps] == [call_times("heun", 2)] * 3
    model = ckpt.load_model(dynamic)
    noise = sample_noise(model, generator, images)
    for image, seen in enumerate(maps):
        _, routing = model(noise[image][None], torch.tensor([seen[0].t]), torch.tensor([image]), drop_fraction=0.4,
                           return_routing=True)  # fmt: skip
        assert torch.equal(seen[0].mask.flatten(), routing.mask[0])
        torch.testing.assert_close(seen[0].prob.flatten(), routing.prob[0], rtol=1e-4, atol=1e-5)


def sample_noise(model, generator, images):
    """The noise that the images begin with: a sampler whose model moves nothing returns it."""
    still = lambda x, t, y: torch.zeros_like(x)  # noqa: E731
    shape = (model.config.in_channels, *model.config.grid)
    return sample(still, torch.arange(len(images)), 1, "euler", shape=shape, progress=False)


def test_a_map_over_its_image():
    mask = torch.tensor([[True, False], [False, True]])
    seen = BoundaryMap(500.0, mask.float(), mask)
    picture = np.asarray(seen.over(Image.new("RGB", (4, 4), (100, 200, 40))))
    kept = mask.numpy().repeat(2, 0).repeat(2, 1)
    assert (picture[kept] == (100, 200, 40)).all() and (picture[~kept] == (25, 50, 10)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": ["cta"]}, "no class 'cta' in .*; accepted: classes such as cat"),
        ({"labels": ["zebra"]}, "no class 'zebra' in .*; accepted: classes such as bird, cat, dog"),
        ({"labels": [3]}, "label 3; accepted: a class name or a number from 0 to 2"),
        ({"labels": [True]}, "label True; accepted"),
        ({"labels": [1.0]}, "label 1.0; accepted"),
        ({"labels": []}, "labels are empty"),
        ({"output_type": "np"}, "output_type is 'np'; accepted: pil, pt, latent"),
        ({"method": "ddim"}, "trained with the objective 'flow', which the method 'ddim' does not fit"),
        ({"batch_size": 0}, "batch_size is 0; accepted: a positive integer"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"drop_fraction": 1.0}, "drop_fraction"),
        ({"drop_fraction": "lines:1"}, "lines"),
        ({"drop_fraction": 0.5, "budget": 9}, "budget is 9, which fixes .*; leave the fractions and capacity out"),
        ({"capacity": 99, "budget": 9}, "budget is 9, which fixes .*; leave the fractions and capacity out"),
        ({"capacity": 1, "labels": [0, 1]}, "capacity is 1; accepted: at least 2, one token for each image"),
        ({"budget": 65}, "budget is 65; accepted: 1 to 64"),
        ({"cfg_interval": (0.1, 0.5)}, "cfg_interval is for guidance; accepted with a cfg_scale other than 1"),
    ],
)
def test_what_is_refused(dynamic, options, message):
    with pytest.raises(ValueError, match=message):
        dcdit.load(dynamic, device="cpu").generate(**{"labels": [1], **QUICK, **options})


def test_what_a_capacity_loses_is_said(dynamic, recwarn):
    """One that is large enough changes nothing and says nothing; "auto" measures the router first."""
    generator = dcdit.load(dynamic, device="cpu")
    draw = partial(generator.generate, [0, 1, 2], batch_size=2, output_type="latent", cfg_scale=2.0, **QUICK)
    exact = draw()
    torch.testing.assert_close(draw(capacity=4 * 64), exact)
    assert generator.model.kept_share is None and not recwarn
    draw(capacity="auto")
    assert generator.model.kept_share.images == 4, "a batch and its unconditional branch"
    recwarn.clear()
    draw(capacity=8)
    (warning,) = recwarn
    assert re.fullmatch(
        r"capacity=8 was too small: \d+ tokens, those of the lowest p, were dropped", str(warning.message)
    )
    assert warning.filename == __file__


def test_a_static_model_drops_nothing(tmp_path):
    ckpt.save_model(tmp_path / "model.safetensors", small_dit(**PIXELS))
    generator = dcdit.load(tmp_path, device="cpu")
    assert len(generator.generate([0, 1], **QUICK)) == 2
    for options in ({"drop_fraction": 0.2}, {"budget": 4}, {"capacity": 99}, {"return_maps": True}):
        (name,) = options
        with pytest.raises(ValueError, match=f"holds a static DiT, which drops no tokens; leave {name} out"):
            generator.generate([0], **options, **QUICK)
    with pytest.raises(ValueError, match=r"no class 'cat' in .*; accepted: numbers, because"):
        generator.generate(["cat"])


def test_class_names_can_be_given(tmp_path, dynamic):
    ckpt.save_model(tmp_path / "model.safetensors", small_dit(**PIXELS))
    assert dcdit.load(tmp_path, device="cpu", class_names=["a", "b", "c"]).labels(["c", 0]) == [2, 0]
    with pytest.raises(ValueError, match=r"2 class names for .*; accepted: 3, one for each"):
        dcdit.load(dynamic, device="cpu", class_names=["a", "b"])
    for damaged in ("[1, 2]", '{"a": 1}', "nonsense"):
        ckpt.save_model(tmp_path / "model.safetensors", small_dit(**PIXELS), notes={"class_names": damaged})
        with pytest.raises(ValueError, match="its class_names"):
            dcdit.load(tmp_path, device="cpu")


def test_nothing_there():
    with pytest.raises(
        FileNotFoundError, match=re.escape("nothing at './runs/a'; accepted: a run or checkpoint folder")
    ):
        dcdit.load("./runs/a")
    with pytest.raises(ValueError, match="device is 'tpu'"):
        dcdit.load("runs/a", device="tpu")


def test_import_stays_light():
    """``import dcdit`` imports no PyTorch. ``load`` is there for completion, and unknown names are errors."""
    code = "import sys, dcdit; assert 'torch' not in sys.modules; print('load' in dir(dcdit), hasattr(dcdit, 'lode'))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True False\n"
