"""What only a GPU can show of training in graphs: that the step can be captured, and what it computes there."""

import copy
from typing import Any

import pytest
import torch
from support.small import randomize_zero_weights
from torch import Tensor, nn

from dcdit.config import load_config
from dcdit.diffusion import NoisyBatch, create_objective
from dcdit.models import DCDiT, DCDiTConfig, DiT, DiTConfig
from dcdit.train.ema import EMA
from dcdit.train.graphed import PLAIN_STEPS, GraphedStep
from dcdit.train.losses import training_losses
from dcdit.train.optimizer import clipped_step, create_optimizer

BATCH, STEPS = 8, 10


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    shared: dict[str, Any] = {"hidden_size": 256, "depth": 3, "num_heads": 4, "num_classes": 10}
    model: Any
    if kind == "dynamic":
        model = DCDiT(DCDiTConfig(grid=(16, 16), class_dropout_prob=0.0, **shared))
    else:
        model = DiT(DiTConfig(grid=(16, 16), patch_size=2, class_dropout_prob=0.0, **shared))
    randomize_zero_weights(model)
    if kind == "dynamic":
        model.router.out.bias.data.fill_(0.0)
    return model.cuda().train()


class Run:
    """A model in training. A step is plain, or in graphs once the first ones are done."""

    def __init__(self, model: nn.Module) -> None:
        keys = {"optim.precision": "bf16", "router.drop_warmup_steps": 3, "router.group_size": BATCH}
        self.config, self.model = load_config(None, keys), model
        self.objective = create_objective("dit", model.config.learn_sigma)
        self.optimizer = create_optimizer(model, 2.0**-13, 0.0, torch.device("cuda"))
        self.ema = EMA(model, 0.9)
        self.graphed = GraphedStep(self.config, model, self.objective, self.optimizer, self.ema)

    def inputs(self, step: int) -> tuple[NoisyBatch, Tensor]:
        generator = torch.Generator("cuda").manual_seed(step)
        shape = (BATCH, self.model.config.in_channels, 16, 16)
        x = torch.randn(shape, device="cuda", generator=generator)
        t, noise = self.objective.draw(shape, torch.device("cuda"), generator)
        return self.objective.noise(x, t, noise), torch.arange(BATCH, device="cuda") % 10

    def plain(self, step: int) -> dict[str, float]:
        noisy, y = self.inputs(step)
        metrics, _ = training_losses(self.config, step, self.model, self.objective, noisy, y, None)
        metrics["loss"].backward()
        norm = clipped_step(self.optimizer, self.config.optim.grad_clip)
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update()
        return {name: float(value.detach()) for name, value in {**metrics, "grad_norm": norm}.items()}

    def in_graphs(self, step: int) -> dict[str, float]:
        if not self.graphed.takes(step):
            return self.plain(step)
        taken = self.graphed.run(step, *self.inputs(step))
        assert taken is not None
        return {name: float(value) for name, value in {**taken[0], "grad_norm": self.graphed.update()}.items()}


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_steps_in_graphs_train_like_plain_ones(kind: str) -> None:
    model = model_of(kind)
    plain, graphed = Run(copy.deepcopy(model)), Run(model)
    for step in range(STEPS):
        expected, found = plain.plain(step), graphed.in_graphs(step)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=0.02), (step, name)
    moved = far = 0.0
    start = model_of(kind).state_dict()
    pairs = [(plain.model.state_dict(), graphed.model.state_dict()), (plain.ema.state, graphed.ema.state)]
    for ours, theirs in pairs:
        for name, tensor in ours.items():
            moved += float((tensor - start[name]).double().square().sum())
            far += float((tensor - theirs[name]).double().square().sum())
    assert far**0.5 < 0.2 * moved**0.5, "the same way, but for rounding"


def test_a_step_in_graphs_syncs_for_one_event_only() -> None:
    run = Run(model_of("dynamic"))
    for _ in range(PLAIN_STEPS + 2):
        run.in_graphs(5)
    noisy, y = run.inputs(5)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.graphed.run(5, noisy, y)
        run.graphed.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
