"""Training and drawing a SparseDiT: counted FLOPs, the loss of its routers, exact resuming, the command line."""

import json

import pytest
import torch
from support.runs import assert_same_weights, records
from support.small import small_dit

import dcdit
from dcdit import checkpoint as ckpt
from dcdit.cli.main import main
from dcdit.config import load_config, override, recipes
from dcdit.models import SparseDiT, count_flops
from dcdit.ops import reference
from dcdit.sample.model_calls import call_times
from dcdit.train import train
from dcdit.train.losses import sparse_ratio_loss

SMALL = {
    "grid": [8, 8],
    "in_channels": 3,
    "hidden_size": 64,
    "depth": 5,
    "num_heads": 4,
    "modules": 1,
    "sparse_depth": 1,
    "sparse_grid": [3, 3],
}
MODELS = {
    "pooled": SMALL,
    "by-time": {**SMALL, "noisy_grid": [1, 2]},
    "routed": {**SMALL, "noisy_grid": [1, 2], "router": "predictability"},
}


@pytest.fixture
def config(archive, tmp_path):
    def config(kind, *overrides, out="run"):
        data = {
            "model": {"name": "SparseDiT-S/2", "num_classes": 3, "overrides": MODELS[kind]},
            "data": {"kind": "npz", "path": str(archive), "held_out": 0.25},
            "optim": {"steps": 4, "batch_size": 4, "lr": 1e-2, "ema_decay": 0.9, "device": "cpu"},
            "run": {"out": str(tmp_path / out), "log_every": 2, "eval_every": 2, "eval_images": 3},
        }
        return override(data, overrides)

    return config


@pytest.mark.parametrize("kind", MODELS)
def test_a_run_and_its_resumption(config, kind):
    whole = train(config(kind))
    first = train(config(kind, "optim.steps=2", out="parts"))
    rest = train(config(kind, out="parts"), resume=first.checkpoint)
    assert_same_weights(rest.checkpoint, whole.checkpoint)
    model = ckpt.load_model(whole.checkpoint)
    assert isinstance(model, SparseDiT)
    most = 3 * 4 * 4 * count_flops(model.config)["total"]
    least = 3 * 4 * 4 * count_flops(model.config, model.config.sparse_tokens_at(1000))["total"]
    spent = [record["flops"] for record in records(whole) if "flops" in record][-1]
    assert spent == most if kind == "pooled" else least < spent < most
    routed = [record for record in records(whole) if "ratio_loss" in record]
    assert len(routed) == (2 if kind == "routed" else 0)
    assert all(0 <= record["natural"] <= 1 for record in routed)
    assert any("val_loss_ema" in record for record in records(whole))


def test_the_split_of_a_batch_does_not_matter(config):
    """Two passes of two images group other timesteps together than one of four."""
    once = train(config("routed", "optim.lr=1e-3", out="once"))
    twice = train(config("routed", "optim.lr=1e-3", "optim.accumulate=2", out="twice"))
    ours, theirs = (ckpt.load_checkpoint(result.checkpoint).model for result in (once, twice))
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=2e-4, msg=name)


def test_the_loss_of_the_routers_by_hand():
    """Each image and router is a group of its own, with the compression of its image as the target."""
    probs = torch.rand(3, 2, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
    counts = torch.tensor([3, 6, 3])
    expected = [
        reference.ratio_loss(probs[i, m][None], probs[i, m][None] > 0.5, 12 / float(counts[i]))
        for i in range(3)
        for m in range(2)
    ]
    loss = sparse_ratio_loss(probs, counts)
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    (grad,) = torch.autograd.grad(loss, probs)
    assert grad.ne(0).any(2).all()


def test_from_a_static_dit(config, tmp_path):
    source = small_dit(num_classes=3, grid=(8, 8), in_channels=3, hidden_size=64, depth=5)
    ckpt.save_model(tmp_path / "dit.safetensors", source)
    run = train(config("pooled", f"upcycle.source={tmp_path / 'dit.safetensors'}", "optim.lr=0"))
    model = ckpt.load_model(run.checkpoint)
    for ours, theirs in (
        (model.blocks[0].value, source.blocks[0].qkv.weight[128:]),
        (model.blocks[1].query, source.blocks[1].qkv.weight[:64]),
        (model.blocks[3].key_value, source.blocks[3].qkv.weight[64:]),
        (model.blocks[4].qkv, source.blocks[4].qkv.weight),
        (model.final_layer.linear, source.final_layer.linear.weight),
    ):
        assert torch.equal(ours.weight, theirs)


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_sampled_and_what_it_cost(config, kind, tmp_path):
    run = train(config(kind, "optim.steps=2"))
    flags = ["--steps", "6", "--labels", "1", "2", "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["sample", "--checkpoint", str(run.checkpoint), "--cfg-scale", "2", *flags]) == 0
    (facts,) = json.loads((tmp_path / "out" / "samples.json").read_text())["runs"]
    model = ckpt.load_model(run.checkpoint)
    tokens = [model.config.sparse_tokens_at(t) for t in call_times("ddpm", 6)]
    assert facts["sparse"] == pytest.approx(sum(tokens) / 6 / 16)
    assert (len(set(tokens)) > 1) == (kind != "pooled")
    cost = sum(count_flops(model.config, few, 2)["total"] for few in tokens)
    assert facts["tflops_per_image"] == pytest.approx(cost / 1e12)
    generator = dcdit.load(run.checkpoint, device="cpu")
    with pytest.raises(ValueError, match="holds a SparseDiT, which drops no tokens; leave drop_fraction out"):
        generator.generate([0], drop_fraction=0.5)
    assert main(["sample", "--checkpoint", str(run.checkpoint), "--drop-fraction", "0.3", *flags]) == 2


def test_recipes():
    for name in ("sparsedit-s-256", "sparsedit-xl-256", "sparsedit-routed-s-256"):
        assert name in recipes()
        assert load_config(name).model.name.startswith("SparseDiT")
