"""Training of dynamic width: the loss, its annealed target, the complete model, exact resuming, what is sampled."""

from dataclasses import replace

import pytest
import torch
from support.runs import assert_same_weights, records
from support.small import save_model, small_dit

import dcdit
from dcdit import checkpoint as ckpt
from dcdit.config import WidthSection, load_config, override, recipes
from dcdit.models import DyDiT, count_flops
from dcdit.models.flops import flops_share
from dcdit.nn import Gates
from dcdit.train import train
from dcdit.train.losses import width_loss
from dcdit.train.schedule import trains_complete, width_target

SMALL = {"grid": [8, 8], "in_channels": 3, "hidden_size": 128, "depth": 2, "num_heads": 4}
MODELS = {"DyDiT-S/2": SMALL, "DC-DiT-S": {**SMALL, "dynamic_width": True}}


@pytest.fixture
def config(archive, tmp_path):
    def config(name, *overrides, out="run"):
        data = {
            "model": {"name": name, "num_classes": 3, "overrides": MODELS[name]},
            "data": {"kind": "npz", "path": str(archive), "held_out": 0.25},
            "optim": {"steps": 4, "batch_size": 4, "lr": 1e-2, "ema_decay": 0.9, "device": "cpu"},
            "router": {"group_size": 2, "target": 2.0, "drop_warmup_steps": 1},
            "width": {"group_size": 2, "warmup_steps": 2, "complete_steps": 3},
            "run": {"out": str(tmp_path / out), "log_every": 2, "eval_every": 0, "eval_images": 3},
        }
        return override(data, overrides)

    return config


def test_the_target_falls_linearly():
    width = WidthSection(target=0.6, warmup_steps=100)
    assert [width_target(width, step) for step in (0, 50, 100, 5000)] == pytest.approx([1.0, 0.8, 0.6, 0.6])
    assert width_target(WidthSection(target=0.6, warmup_steps=0), 0) == 0.6


def test_the_complete_model_is_trained_first():
    width = WidthSection(complete_steps=3)
    assert [trains_complete(width, step) for step in (0, 2, 3)] == [True, True, False]


def test_the_loss_by_hand():
    """Two groups of two images with mean shares .7 and .5 and target .5; one of four MLPs runs on 5 % of its tokens."""
    tokens = torch.ones(4, 2, 20)
    tokens[0, 1, 1:] = 0
    gates = Gates(torch.ones(4, 2, 4), torch.ones(4, 2, 4), tokens)
    width = WidthSection(target=0.5, warmup_steps=0, group_size=2, least_tokens=0.1)
    share = torch.tensor([0.6, 0.8, 0.3, 0.7])
    # (0.2^2 + 0^2) / 2, and 0.1 - 0.05 in one image of four.
    assert width_loss(width, 0, share, gates).item() == pytest.approx(0.02 + 0.05 / 4)
    assert width_loss(width, 0, share, gates._replace(tokens=None)).item() == pytest.approx(0.02)


def test_the_loss_closes_gates_above_the_target_and_opens_them_below():
    width = WidthSection(target=0.5, warmup_steps=0, group_size=None)
    share = torch.tensor([0.8, 0.3], requires_grad=True)
    gates = Gates(torch.ones(2, 1, 2), torch.ones(2, 1, 2), None)
    for target, sign in ((0.5, 1), (0.6, -1)):
        (gradient,) = torch.autograd.grad(width_loss(replace(width, target=target), 0, share, gates), share)
        assert torch.equal(gradient.sign(), torch.full((2,), float(sign)))


@pytest.mark.parametrize("name", MODELS)
def test_a_run_and_its_resumption(config, name):
    whole = train(config(name))
    first = train(config(name, "optim.steps=2", out="parts"))
    rest = train(config(name, out="parts"), resume=first.checkpoint)
    assert_same_weights(rest.checkpoint, whole.checkpoint)
    # No record mixes steps with and without the complete model.
    steps = [(record["step"], "complete_loss" in record) for record in records(whole)]
    assert steps == [(2, True), (3, True), (4, False)]
    assert records(whole)[0]["width_target"] == pytest.approx(0.75) and records(whole)[1]["width_target"] == 0.5
    assert 0 < records(whole)[-1]["flops_share"] <= 1
    if name == "DyDiT-S/2":
        # Masked steps cost as much as the complete model's.
        forward = count_flops(ckpt.load_model(whole.checkpoint).config)["total"]
        assert records(whole)[-1]["flops"] == 3 * 4 * forward * (3 * 2 + 1)


def test_the_split_of_a_batch_does_not_matter(config):
    """Two passes of two images see the same noise of gates as one of four."""
    once = train(config("DyDiT-S/2", "width.least_tokens=0", out="once"))
    twice = train(config("DyDiT-S/2", "width.least_tokens=0", "optim.accumulate=2", out="twice"))
    ours, theirs = (ckpt.load_checkpoint(result.checkpoint).model for result in (once, twice))
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=2e-4, msg=name)


def test_the_loss_brings_the_share_to_the_target(config):
    """Only the gates learn, from logits near 0."""
    model = ckpt.load_model(train(config("DyDiT-S/2", "optim.steps=1")).checkpoint)
    torch.nn.init.constant_(model.width_gates.linear.bias, 1.0)
    for gate in model.token_gates:
        torch.nn.init.constant_(gate.fc2.bias, 1.0)
    model.train()
    gates = [*model.width_gates.parameters(), *model.token_gates.parameters()]
    optimizer = torch.optim.Adam(gates, lr=0.1)
    torch.manual_seed(0)
    width = WidthSection(target=0.3, warmup_steps=0, group_size=None)
    x, t, y = torch.randn(16, 3, 8, 8), torch.arange(16) * 60, torch.arange(16) % 3
    shares = []
    for _ in range(80):
        _, drawn = model(x, t, y, return_gates=True)
        share = flops_share(model.config, drawn)
        width_loss(width, 0, share, drawn).backward()
        optimizer.step()
        optimizer.zero_grad()
        shares.append(share.mean().item())
    assert shares[0] > 0.4
    assert sum(shares[-10:]) / 10 == pytest.approx(0.3, abs=0.05)


def test_a_dydit_from_a_static_dit(config, tmp_path):
    source = small_dit(num_classes=3, grid=(8, 8), in_channels=3)
    save_model(tmp_path / "dit.safetensors", source)
    run = train(config("DyDiT-S/2", f"upcycle.source={tmp_path / 'dit.safetensors'}", "optim.lr=0"))
    model = ckpt.load_model(run.checkpoint)
    assert isinstance(model, DyDiT)
    weights = model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in source.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_what_is_sampled_is_what_the_masked_model_draws(config, name):
    generator = dcdit.load(train(config(name)).checkpoint, device="cpu")
    images = generator.generate([0, 1, 2], num_steps=5, cfg_scale=2.0, output_type="latent", progress=False)
    masked = dcdit.diffusion.sample(
        generator.model, torch.tensor([0, 1, 2]), 5, cfg_scale=2.0, clip=True, progress=False
    )
    torch.testing.assert_close(images, masked, rtol=1e-4, atol=1e-4)


def test_groups_must_fit(config):
    with pytest.raises(ValueError, match=r"width.group_size is 3; accepted: a divisor of the 4 images"):
        train(config("DyDiT-S/2", "width.group_size=3"))


def test_recipes():
    for name in ("dydit-s-256", "dydit-xl-256", "dc-dit-width-s-256"):
        assert name in recipes()
        assert load_config(name).width.target == 0.5
