"""The first version of DC-DiT: the cosine router over the grid, at N = 16 and N = 4."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.small import batch

from dcdit import checkpoint as ckpt
from dcdit.config import load_config
from dcdit.models import DCDiT, create_config, create_model
from dcdit.ops import ratio_loss
from dcdit.train import train

CONFIG = Path(__file__).parents[2] / "dcdit" / "config" / "recipes" / "dc-dit-v1-xl-256.yaml"
TINY = {"grid": (8, 8), "hidden_size": 128, "depth": 1, "num_heads": 2}


def tiny():
    torch.manual_seed(0)
    return create_model("DC-DiT-S", num_classes=10, router="cosine2d", **TINY)


def test_the_configuration_is_the_published_size_with_the_other_router():
    config = load_config(CONFIG)
    assert config.router.target == 16
    model = create_config(
        config.model.name, config.model.image_size, config.model.num_classes, **config.model.overrides
    )
    assert model == create_config("DC-DiT-XL", router="cosine2d")


@pytest.mark.parametrize("target", [16, 4])
def test_two_steps_of_training(target, tmp_path):
    rng = np.random.default_rng(0)
    data = tmp_path / "data"
    data.mkdir()
    np.save(data / "latents.npy", rng.standard_normal((8, 4, 8, 8), dtype=np.float32))
    np.save(data / "labels.npy", np.arange(8) % 2)
    sets = {f"model.overrides.{name}": list(value) if name == "grid" else value for name, value in TINY.items()}
    sets |= {"data.path": data, "data.held_out": 0.25, "data.workers": 0, "model.num_classes": 2}
    sets |= {"optim.steps": 2, "optim.batch_size": 4, "optim.precision": "fp32", "optim.device": "cpu"}
    sets |= {"router.target": target, "router.group_size": 4, "run.out": tmp_path / "run", "run.eval_every": 0}
    config = load_config(CONFIG, [f"{key}={value}" for key, value in sets.items()])
    model = ckpt.load_model(train(config).checkpoint, ema=False)
    assert isinstance(model, DCDiT) and model.config.router == "cosine2d"
    # AdamW moves a weight by about the learning rate in each step, if it has a gradient.
    torch.testing.assert_close(model.router.filter, torch.full_like(model.router.filter, 1 / 9), rtol=0, atol=4e-4)
    assert (model.router.filter != 1 / 9).any()
    assert all(not torch.equal(w, torch.eye(128)) for w in (model.router.query.weight, model.router.key.weight))


def test_starts_with_hardly_a_token_and_learns_to_keep_more():
    """The projections start as the identity and the filter includes the token itself. So even in noise hardly a token
    is far from its neighbourhood, and an image keeps its most probable one. The ratio loss alone raises the rest.
    """
    model = tiny()
    x, t, y = batch(model.config, 4)
    _, routing = model(x, t, y, return_routing=True)
    assert routing.natural_mask.float().mean() < 0.02 and (routing.mask.sum(1) >= 1).all()
    optimizer = torch.optim.SGD(model.router.parameters(), lr=10.0)
    means = []
    for _ in range(3):
        _, routing = model(x, t, y, return_routing=True)
        ratio_loss(routing.prob, routing.natural_mask, 16.0).backward()
        optimizer.step()
        optimizer.zero_grad()
        means.append(routing.prob.mean().item())
    assert means == sorted(means) and means[-1] > means[0] + 1e-3


def test_every_weight_of_the_router_learns_from_the_output():
    """Through the straight-through gate and the de-chunk, without the ratio loss and from the very start."""
    model = tiny()
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)  # adaLN-Zero starts with an output of zero
    x, t, y = batch(model.config, 4)
    (model(x, t, y) * torch.randn(4, 8, 8, 8)).sum().backward()
    for name, parameter in model.router.named_parameters():
        assert parameter.grad.norm() > 0, name
