"""Every file that holds a static DiT gives the same DiT, and everything else one line that says what is wrong."""

import argparse
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.small import batch, randomize_zero_weights, small_dc_dit, small_dit

from dcdit import checkpoint
from dcdit.checkpoint import load_static_dit, read_objective, read_state_dict
from dcdit.cli import main
from dcdit.models import to_dit

WIDTH = {"grid": (8, 8), "hidden_size": 384, "num_heads": 6, "depth": 1}
"""Of DiT-S, whose number of heads is known."""


@pytest.fixture(scope="module")
def dit():
    return small_dit(**WIDTH)


def assert_same_model(loaded, dit):
    assert loaded.config == dit.config and not loaded.training
    inputs = batch(dit.config)
    torch.testing.assert_close(loaded(*inputs), dit(*inputs), rtol=1e-5, atol=1e-5)
    assert all(tensor.dtype == torch.float32 for tensor in loaded.state_dict().values())


def own_run(folder, dit, notes):
    """A run folder whose averaged weights are the model's, and whose last weights are zero."""
    optimizer = torch.optim.AdamW(dit.parameters())
    last = small_dit(**WIDTH)
    torch.nn.utils.vector_to_parameters(torch.zeros(sum(p.numel() for p in last.parameters())), last.parameters())
    checkpoint.save_checkpoint(folder / "checkpoints/step_00000001", last, dit.state_dict(), optimizer, {}, notes)


# --- what is read -------------------------------------------------------------------------------------------------


def test_state_dict_of_facebookresearch(dit, tmp_path):
    torch.save(to_dit(dit), tmp_path / "DiT.pt")
    assert_same_model(load_static_dit(tmp_path / "DiT.pt"), dit)
    assert_same_model(load_static_dit(str(tmp_path / "DiT.pt"), num_heads=6), dit)


def test_training_checkpoint_of_facebookresearch(dit, tmp_path):
    """As its train.py writes them: averaged weights beside the last ones, the optimiser, and an argparse namespace."""
    last = {key: torch.zeros_like(value) for key, value in to_dit(dit).items()}
    args = argparse.Namespace(model="DiT-S/2", image_size=256, ckpt_every=50_000)
    torch.save({"model": last, "ema": to_dit(dit), "opt": {"state": {}}, "args": args}, tmp_path / "0050000.pt")
    assert_same_model(load_static_dit(tmp_path / "0050000.pt"), dit)


WRAPPED = {
    "model alone": lambda s: {"model": s, "opt": {"state": {}}},
    "state_dict": lambda s: {"epoch": 3, "state_dict": s},
    "nested": lambda s: {"state_dict": {"model": s}},
    "distributed": lambda s: renamed(s, lambda name: f"module.{name}"),
    "compiled": lambda s: {"ema": renamed(s, lambda name: f"_orig_mod.{name}"), "model": {"a": torch.zeros(1)}},
    "both": lambda s: {"model": renamed(s, lambda name: f"module._orig_mod.{name}")},
    "the other way round": lambda s: renamed(s, lambda name: f"_orig_mod.module.{name}"),
    "compiled blocks": lambda s: renamed(s, lambda name: name.replace("blocks.0.", "blocks.0._orig_mod.")),
    "checkpointing": lambda s: renamed(
        s, lambda name: name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module.")
    ),
    "averaged": lambda s: {"n_averaged": torch.tensor(3), **renamed(s, lambda name: f"module.{name}")},
}


def renamed(state, rename):
    return {rename(name): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_what_training_scripts_put_around_a_state_dict(dit, tmp_path, wrap):
    torch.save(wrap(to_dit(dit)), tmp_path / "DiT.pt")
    assert_same_model(load_static_dit(tmp_path / "DiT.pt"), dit)


def test_names_of_wrappers_in_safetensors(dit, tmp_path):
    save_file(renamed(to_dit(dit), lambda name: f"module.{name}"), tmp_path / "DiT.safetensors")
    assert_same_model(load_static_dit(tmp_path / "DiT.safetensors"), dit)


def test_the_last_weights_of_a_checkpoint(tmp_path):
    averaged, last = {"a": torch.zeros(1)}, {"a": torch.ones(1)}
    torch.save({"model": last, "ema": averaged}, tmp_path / "both.pt")
    torch.save({"ema": averaged}, tmp_path / "averaged.pt")
    assert [float(read_state_dict(tmp_path / "both.pt", ema)["a"]) for ema in (True, False)] == [0, 1]
    with pytest.raises(ValueError, match=r"averaged\.pt holds no state dict"):
        read_state_dict(tmp_path / "averaged.pt", ema=False)
    torch.save({"a": torch.zeros(1), "_orig_mod.a": torch.zeros(1)}, tmp_path / "twice.pt")
    with pytest.raises(ValueError, match=r"twice\.pt: the weight 'a' is there twice, once as '_orig_mod\.a'"):
        read_state_dict(tmp_path / "twice.pt")


def test_safetensors_with_the_same_keys(dit, tmp_path):
    save_file(to_dit(dit), tmp_path / "DiT.safetensors")
    assert_same_model(load_static_dit(tmp_path / "DiT.safetensors"), dit)


def test_half_precision_is_read_as_float32(dit, tmp_path):
    half = {key: value.half() for key, value in to_dit(dit).items()}
    save_file(half, tmp_path / "DiT.safetensors")
    loaded = load_static_dit(tmp_path / "DiT.safetensors")
    assert torch.equal(loaded.blocks[0].fc1.weight, dit.blocks[0].fc1.weight.half().float())


def test_heads_of_other_widths(tmp_path):
    narrow = small_dit(grid=(8, 8))
    save_file(to_dit(narrow), tmp_path / "DiT.safetensors")
    assert_same_model(load_static_dit(tmp_path / "DiT.safetensors", num_heads=4), narrow)
    with pytest.raises(ValueError, match="has width 128, no published one, so num_heads has to be given"):
        load_static_dit(tmp_path / "DiT.safetensors")


def test_our_own_files(dit, tmp_path):
    own_run(tmp_path / "run", dit, {"objective": "flow"})
    folder = tmp_path / "run/checkpoints/step_00000001"
    for path in (tmp_path / "run", folder, folder / "ema.safetensors"):
        assert_same_model(load_static_dit(path), dit)
        assert read_objective(path) == "flow"


def diffusers_folder(path, dit, **options):
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=64,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    model.load_state_dict(to_dit(dit, "diffusers"))
    model.save_pretrained(path, **options)


def test_diffusers_transformer_and_pipeline(dit, tmp_path):
    pytest.importorskip("diffusers")
    diffusers_folder(tmp_path / "transformer", dit)
    (tmp_path / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    for path in (tmp_path, tmp_path / "transformer"):
        assert_same_model(load_static_dit(path), dit)
        assert read_objective(path) is None


@pytest.mark.parametrize("variant", [None, "fp16", "bf16"])
@pytest.mark.parametrize("max_shard_size", ["4MB", "1GB"])
def test_diffusers_in_shards_and_variants(dit, tmp_path, variant, max_shard_size):
    pytest.importorskip("diffusers")
    diffusers_folder(tmp_path, dit, variant=variant, max_shard_size=max_shard_size)
    names = [path.name for path in tmp_path.glob("*.safetensors")]
    assert (len(names) > 1) == (max_shard_size == "4MB") and all((variant or "") in name for name in names)
    assert_same_model(load_static_dit(tmp_path), dit)


def test_diffusers_with_several_variants(dit, tmp_path):
    pytest.importorskip("diffusers")
    for variant in ("fp16", "bf16"):
        diffusers_folder(tmp_path, dit, variant=variant)
    refused(tmp_path, "holds the variants bf16, fp16; accepted: one of them")
    diffusers_folder(tmp_path, dit)
    assert_same_model(load_static_dit(tmp_path), dit)


def test_a_dit_that_diffusers_trained(tmp_path):
    """Embedders that differ: the model is diffusers' own, also in what it shares with no original DiT."""
    transformer = pytest.importorskip("diffusers.models.transformers.dit_transformer_2d")
    torch.manual_seed(0)
    model = transformer.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        out_channels=8,
        num_layers=2,
        norm_eps=0.1,
        sample_size=8,
        num_embeds_ada_norm=10,
    ).eval()
    randomize_zero_weights(model)
    model.save_pretrained(tmp_path)
    loaded = load_static_dit(tmp_path)
    x, t, y = batch(loaded.config)
    expected = model(x, timestep=t, class_labels=y).sample
    torch.testing.assert_close(loaded(x, t, y), expected, rtol=1e-4, atol=1e-5)
    out = tmp_path / "run"
    command = ["upcycle", "--from", tmp_path, "--data-path", latents(tmp_path), "--steps", 1, "--batch-size", 2]
    command += [
        "--set",
        "run.eval_every=0",
        "--set",
        "data.kind=latents",
        "--set",
        "router.group_size=null",
        "--device",
        "cpu",
        "--out",
        out,
    ]
    assert main([str(word) for word in command]) == 0
    saved = checkpoint.load_model(out)
    assert saved.config.separate_embedders and saved.config.frequency_shift == 1
    assert torch.equal(saved.t_embedder(t), loaded.t_embedder(t)) and torch.equal(
        saved.y_embedder(y), loaded.y_embedder(y)
    )


def test_what_the_configuration_of_diffusers_says_beside_sizes(dit, tmp_path):
    pytest.importorskip("diffusers")
    diffusers_folder(tmp_path, dit)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "norm_eps": 0.1}))
    assert load_static_dit(tmp_path).config.mlp_norm_eps == 1e-6, "the original's, which trained the weights"
    (tmp_path / "config.json").write_text(json.dumps({**config, "activation_fn": "geglu"}))
    refused(tmp_path, r"has the activation_fn 'geglu'; accepted: 'gelu-approximate', DiT's")


def latents(folder):
    arrays = {"latents": np.random.default_rng(0).standard_normal((4, 4, 8, 8), "f4"), "labels": np.arange(4)}
    np.savez(folder / "latents.npz", **arrays)
    return folder / "latents.npz"


def test_an_index_of_shards_names_no_file_outside_of_its_folder(dit, tmp_path):
    save_file(to_dit(dit, "diffusers"), tmp_path / "outside.safetensors")
    folder = tmp_path / "dit"
    folder.mkdir()
    config = {"_class_name": "DiTTransformer2DModel", "sample_size": 8, "num_attention_heads": 6}
    (folder / "config.json").write_text(json.dumps(config))
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors")):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        refused(folder, rf"index\.json lists '{name}'; accepted: files inside the folder")


# --- what is refused ----------------------------------------------------------------------------------------------


def refused(path, match, error=ValueError):
    with pytest.raises(error, match=match) as found:
        load_static_dit(path)
    assert "\n" not in str(found.value)


def test_files_that_need_unpickling(tmp_path, dit):
    torch.save({"ema": to_dit(dit), "args": randomize_zero_weights}, tmp_path / "code.pt")
    refused(
        tmp_path / "code.pt",
        r"code\.pt is refused, because loading it would call support\.small\.randomize_zero_weights",
    )


def test_nothing_there(tmp_path):
    refused(tmp_path / "DiT.pt", "no pretrained DiT", FileNotFoundError)
    refused(tmp_path, "no checkpoint in", FileNotFoundError)


def test_other_files(tmp_path):
    (tmp_path / "DiT.onnx").write_bytes(b"")
    refused(tmp_path / "DiT.onnx", r"accepted: \.pt, \.pth, \.safetensors, or a folder")
    (tmp_path / "DiT.safetensors").write_bytes(b"12345")
    refused(tmp_path / "DiT.safetensors", "damaged or no safetensors file")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    refused(tmp_path / "other.pt", r"other\.pt: not a DiT state dict .*x_embedder\.proj\.weight is missing")


def test_dynamic_models_are_no_source(tmp_path):
    checkpoint.save_model(tmp_path / "model.safetensors", small_dc_dit())
    refused(tmp_path / "model.safetensors", "holds a DCDiT; accepted: a static DiT")


def test_diffusers_weights_without_their_configuration(tmp_path, dit):
    save_file(to_dit(dit, "diffusers"), tmp_path / "weights.safetensors")
    refused(tmp_path / "weights.safetensors", r"key format of diffusers; accepted: the folder with its config\.json")


def test_diffusers_folders_of_something_else(tmp_path):
    config = {"_class_name": "UNet2DModel", "sample_size": 8, "num_attention_heads": 6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, r"is of a 'UNet2DModel'; accepted: DiTTransformer2DModel")
    config["_class_name"] = "DiTTransformer2DModel"
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"")
    refused(tmp_path, "accepted: weights in safetensors, not pickled ones", FileNotFoundError)
    for text in ("{", "[]", '{"_class_name": "DiTTransformer2DModel"}'):
        (tmp_path / "config.json").write_text(text)
        refused(tmp_path, "damaged or (no JSON|of something else: no '(_class_name|sample_size)' in it)")
