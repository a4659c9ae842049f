"""The pipeline: images equal to those of ``dcdit.diffusion.sample``, its options, callbacks, and how it is loaded."""

import json
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from diffusers.callbacks import PipelineCallback
from support.autoencoder import save_autoencoder
from support.small import small_dc_dit, small_dit

import dcdit
from dcdit import checkpoint as ckpt
from dcdit.data.autoencoder import load_autoencoder
from dcdit.diffusion import sample
from dcdit.diffusion.noise import ImageNoise
from dcdit.integrations.diffusers import DCDiTPipeline, StaticDiTTransformer2DModel

NAMES = ("bird", "cat", "dog")
NOTES = {"class_names": json.dumps(NAMES)}
LABELS = torch.tensor([1, 2, 0])
PIXELS = {"grid": (8, 8), "in_channels": 3, "num_classes": 3}


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def saved(path, model, notes=NOTES):
    ckpt.save_model(path, model, notes=notes)
    return quiet(DCDiTPipeline.from_dcdit(path))


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    model = small_dc_dit(**PIXELS)
    model.objective = "dit"
    return saved(tmp_path_factory.mktemp("pixels") / "model.safetensors", model)


def noise(pipe, seed=0):
    config = pipe.transformer.config
    shape, start = (config.in_channels, *config.grid), torch.zeros((), dtype=torch.int64)
    return ImageNoise(seed, 0, len(LABELS), shape, torch.device("cpu"), torch.float32)(start)


def drawn(pipe, *, labels=("cat", 2, "bird"), num_inference_steps=4, **options):
    options = {"latents": noise(pipe), "output_type": "latent", **options}
    return pipe(labels, num_inference_steps=num_inference_steps, **options).images


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"guidance_scale": 1.0}, {}),
        ({"guidance_scale": 2.0, "drop_fraction": 0.3}, {"cfg_scale": 2.0, "drop_fraction": 0.3}),
        (
            {"guidance_scale": 2.0, "drop_fraction": "linear:0.6:0.1", "uncond_drop_fraction": 0.9},
            {"cfg_scale": 2.0, "drop_fraction": (lambda time: 0.1 + 0.5 * time, 0.9)},
        ),
        (
            {"guidance_scale": 2.0, "budget": 9, "guidance_channels": 1},
            {"cfg_scale": 2.0, "budget": 9, "cfg_channels": 1},
        ),
        ({"guidance_scale": 3.0, "guidance_interval": (0.3, 0.8)}, {"cfg_scale": 3.0, "cfg_interval": (0.3, 0.8)}),
    ],
)
def test_equal_to_ours(pixels, theirs, ours):
    """To the bit with the same scheduler, and up to rounding with our DDIM."""
    model = pixels.transformer.to_dcdit()
    images = drawn(pixels, **theirs)
    assert torch.equal(images, sample(model, LABELS, 4, scheduler=pixels.scheduler, progress=False, **ours))
    expected = sample(model, LABELS, "ddim4", "ddim", clip=True, progress=False, **ours)
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)


def test_schedulers_are_swapped_as_everywhere(pixels):
    pipe = quiet(DCDiTPipeline(pixels.transformer, pixels.scheduler))
    before = drawn(pipe)
    for kind in (diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler):
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
        expected = sample(
            pipe.transformer.to_dcdit(), LABELS, 4, scheduler=pipe.scheduler, cfg_scale=4.0, progress=False
        )
        assert torch.equal(drawn(pipe), expected) and not torch.allclose(before, expected)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="trained with the objective 'dit', which FlowMatchEulerDiscreteScheduler"):
        drawn(pipe)


def test_flow_and_the_static_model(tmp_path):
    model = small_dit(**PIXELS)
    model.objective = "flow"
    pipe = saved(tmp_path / "static.safetensors", model)
    assert type(pipe.transformer) is StaticDiTTransformer2DModel
    expected = sample(model, LABELS, 4, "euler", cfg_scale=4.0, progress=False)
    torch.testing.assert_close(drawn(pipe), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="a static DiT, which drops no tokens"):
        drawn(pipe, drop_fraction=0.3)
    forward = pipe.transformer.forward
    pipe.transformer.forward = lambda *args, **options: forward(*args, **options)  # as cache-dit wraps it
    torch.testing.assert_close(drawn(pipe), expected, rtol=1e-5, atol=1e-5)


def test_outputs_of_pixels(pixels):
    raw = (drawn(pixels) / 2 + 0.5).clamp(0, 1)
    assert torch.equal(drawn(pixels, output_type="pt"), raw)
    array = drawn(pixels, output_type="np")
    np.testing.assert_allclose(array, raw.permute(0, 2, 3, 1).numpy())
    images = drawn(pixels, output_type="pil")
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in images]), (array * 255).round())
    latents = noise(pixels)
    (tuple_of_one,) = pixels([1, 2, 0], 4.0, None, 4, "latent", False, latents=latents)
    assert torch.equal(tuple_of_one, drawn(pixels))


def test_latents_are_decoded_as_the_training_saw_them(tmp_path):
    notes = {**NOTES, "latent_range": "[[0.1, 0.2, 0.3, 0.4], [2.0]]"}
    ckpt.save_model(tmp_path / "model.safetensors", small_dc_dit(grid=(8, 8), num_classes=3), notes=notes)
    save_autoencoder(tmp_path / "vae")
    pipe = quiet(DCDiTPipeline.from_dcdit(tmp_path / "model.safetensors"))
    x = drawn(pipe)
    decoded = drawn(pipe, output_type="pt")
    with torch.no_grad():
        z = x / 2 + torch.tensor([0.1, 0.2, 0.3, 0.4]).view(4, 1, 1)
        expected = load_autoencoder(tmp_path / "vae", torch.device("cpu")).decode(z).sample
    torch.testing.assert_close(decoded, (expected / 2 + 0.5).clamp(0, 1))
    pipe.enable_vae_slicing()
    assert pipe.vae.use_slicing
    torch.testing.assert_close(drawn(pipe, output_type="pt"), decoded)
    pipe.disable_vae_slicing()
    pipe.enable_vae_tiling()
    assert pipe.vae.use_tiling and not pipe.vae.use_slicing
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = quiet(DCDiTPipeline.from_pretrained(tmp_path / "pipe"))
    torch.testing.assert_close(drawn(loaded, output_type="pt"), decoded)
    with pytest.raises(ValueError, match="the vae decodes 4 channels, the transformer makes 3"):
        DCDiTPipeline.from_dcdit(small_dc_dit(**PIXELS), vae=pipe.vae)


class Halve(PipelineCallback):
    """Halves the state after the first step, and stops after the second."""

    tensor_inputs = ("latents",)

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        assert timestep == pipeline.scheduler.timesteps[step_index] and pipeline.num_timesteps == 4
        self.seen = step_index
        pipeline._interrupt = step_index == 1
        return {"latents": callback_kwargs["latents"] / (2 if step_index == 0 else 1)}


def test_callbacks_change_latents_guidance_and_the_end(pixels):
    callback = Halve()
    stopped = drawn(pixels, callback_on_step_end=callback)
    assert callback.seen == 1 and pixels.interrupt

    states = []

    def unguide(pipe, number, timestep, given):
        states.append(given["latents"])
        pipe._guidance_scale = 0.0  # as diffusers' SDCFGCutoffCallback does
        return {}

    drawn(pixels, guidance_scale=3.0, callback_on_step_end=unguide)
    guided, plain = states, []
    drawn(
        pixels, guidance_scale=1.0, latents=noise(pixels),
        callback_on_step_end=lambda pipe, number, t, given: plain.append(given["latents"]) or {},
    )  # fmt: skip
    assert not torch.allclose(guided[0], plain[0]) and not torch.allclose(stopped, guided[1])
    model, scheduler, x = pixels.transformer.to_dcdit(), pixels.scheduler, guided[0]
    with torch.no_grad():
        out = model(x, scheduler.timesteps[1].expand(3), LABELS)[:, :3]
    expected = scheduler.step(out, scheduler.timesteps[1], x, use_clipped_model_output=True).prev_sample
    torch.testing.assert_close(guided[1], expected)


def test_generators(pixels):
    """One for all, or one for each image, whose noise then does not depend on the others."""
    one = [pixels(["cat"] * 2, 1.0, torch.Generator().manual_seed(5), 2, "latent").images for _ in range(2)]
    assert torch.equal(*one)
    each = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    both = pixels(["cat"] * 2, 1.0, each, 2, "latent", eta=1.0).images
    alone = pixels("cat", 1.0, [torch.Generator().manual_seed(6)], 2, "latent", eta=1.0).images
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": ["cow"]}, "no class 'cow' in DCDiT; accepted: classes such as"),
        ({"labels": [3]}, "label 3; accepted: a class name or a number from 0 to 2"),
        ({"output_type": "jpg"}, "output_type is 'jpg'; accepted: pil, np, pt, latent"),
        ({"budget": 3, "drop_fraction": 0.1}, "budget is 3, which fixes the tokens kept"),
        ({"uncond_drop_fraction": 0.5, "guidance_scale": 1.0}, "uncond_drop_fraction is for guidance"),
        ({"drop_fraction": 1.0}, "drop_fraction is 1.0"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, r"latents have shape \(1, 3, 8, 8\); accepted: \(3, 3, 8, 8\)"),
        ({"generator": [torch.Generator()]}, "there are 1 generators; accepted: one, or 3"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "holds 'prompt_embeds'; accepted: latents"),
        ({"num_inference_steps": 0}, "num_steps is 0; accepted for a scheduler: a positive integer"),
    ],
)
def test_what_is_not_accepted(pixels, options, message):
    with pytest.raises(ValueError, match=message):
        drawn(pixels, **options)


def test_parts_that_do_not_fit():
    pipe = DCDiTPipeline.from_dcdit(small_dc_dit(grid=(8, 8)))
    with pytest.raises(ValueError, match="makes latents of 4 channels and there is no vae that decodes them"):
        pipe([1])
    with pytest.raises(ValueError, match="the pipeline has no vae"):
        pipe.enable_vae_slicing()
    with pytest.raises(ValueError, match="the transformer is a DCDiT; accepted: DCDiTTransformer2DModel, Static"):
        DCDiTPipeline(small_dc_dit(), pipe.scheduler)
    without_null = DCDiTPipeline.from_dcdit(small_dc_dit(**PIXELS, class_dropout_prob=0.0))
    with pytest.raises(ValueError, match=r"cfg_scale is 4.0 but there is no null class"):
        without_null([1])


def test_a_run_folder_takes_the_averages(tmp_path, pixels):
    model = pixels.transformer.to_dcdit()
    other = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters())
    ckpt.save_checkpoint(
        ckpt.checkpoint_path(tmp_path, 1), model, model.state_dict(), optimizer, {"step": 1}, NOTES, other
    )
    pipe = quiet(DCDiTPipeline.from_dcdit(tmp_path))
    assert torch.equal(drawn(pipe), drawn(pixels)) and pipe.labels == {"bird": 0, "cat": 1, "dog": 2}
    images = dcdit.load(tmp_path, device="cpu").generate(
        ["cat", 2, "bird"], method="ddim", num_steps="ddim4", cfg_scale=4.0, output_type="latent", progress=False
    )
    torch.testing.assert_close(drawn(pipe), images, rtol=1e-4, atol=1e-4)
    weights = DCDiTPipeline.from_dcdit(tmp_path, ema=False).transformer.state_dict()
    assert torch.equal(weights["model.x_embedder.weight"], other["x_embedder.weight"])


FRESH = """
import sys, torch
import dcdit.integrations.diffusers
from diffusers import DiffusionPipeline
torch.set_num_threads(1)  # as in this process: the number of threads decides the order of sums
folder, latents = sys.argv[1], torch.load(sys.argv[2])
pipe = DiffusionPipeline.from_pretrained(folder)
print(type(pipe).__module__, type(pipe).__name__)
torch.save(pipe(["cat", 2, "bird"], num_inference_steps=4, latents=latents, output_type="latent").images, sys.argv[3])
"""


def test_loaded_in_a_fresh_process(tmp_path, pixels):
    """diffusers' own loader, after the one import that the documentation names: the same bits."""
    pixels.save_pretrained(tmp_path / "pipe")
    card = (tmp_path / "pipe" / "README.md").read_text()
    assert 'DCDiTPipeline.from_pretrained("PATH")' in card and "bird, cat, dog" in card
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["transformer"] == ["dcdit.integrations.diffusers", "DCDiTTransformer2DModel"]
    torch.save(noise(pixels), tmp_path / "noise.pt")
    files = [str(tmp_path / name) for name in ("pipe", "noise.pt", "images.pt")]
    done = subprocess.run([sys.executable, "-c", FRESH, *files], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["dcdit.integrations.diffusers", "DCDiTPipeline"]
    assert torch.equal(torch.load(tmp_path / "images.pt"), drawn(pixels))
    assert torch.equal(drawn(quiet(DCDiTPipeline.from_pretrained(tmp_path / "pipe"))), drawn(pixels))


def test_the_hub_accepts_the_component(tmp_path, pixels):
    """Before it downloads, diffusers checks that it knows the library of each component."""
    from diffusers.pipelines.pipeline_loading_utils import _get_custom_components_and_folders

    pixels.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    files = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")]
    assert _get_custom_components_and_folders("owner/name", index, files)[0] == {}
