"""Runs that diverge: the error names what is not finite, and good checkpoints stay."""

import itertools

import numpy as np
import pytest
import torch
from support.runs import records
from torch.optim.optimizer import register_optimizer_step_post_hook

from dcdit import checkpoint as ckpt
from dcdit.config import override
from dcdit.train import EMA, train


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.name=DiT-S/2"], "the loss is nan at step 4;"),
        (["model.name=DiT-S/2", "run.log_every=50"], "the loss is nan at step 4;"),
        (["model.name=DiT-S/2", "run.log_every=50", "run.eval_every=5"], "the loss is nan at step 4;"),
        (["run.log_every=50"], "the router's probabilities are not finite at step 4;"),
    ],
)
def test_a_run_that_diverges_keeps_its_good_checkpoints(config, overrides, message):
    """Step 3 gets an enormous learning rate. Nothing that is not finite is saved or logged, and the run can go on."""
    settings = config(*overrides, "run.checkpoint_every=2", "run.keep_checkpoints=1", "optim.steps=2")
    good = train(settings)
    settings.optim.steps, settings.optim.lr = 20, 1e30
    with pytest.raises(FloatingPointError, match=f"^{message} lower optim.lr or check the data$"):
        train(settings, resume=settings.run.out)
    assert ckpt.list_checkpoints(settings.run.out) == [good.checkpoint]
    assert all(np.isfinite(list(record.values())).all() for record in records(good))
    settings.optim.steps, settings.optim.lr = 4, 1e-3
    assert train(settings, resume=settings.run.out).step == 4


def spoil_gradient(optimizer, ema):
    optimizer.param_groups[0]["params"][-1].register_hook(lambda grad: grad * torch.nan)


def spoil_weights(optimizer, ema):
    optimizer.param_groups[0]["params"][-1].data.view(-1)[0] = torch.inf


def spoil_averages(optimizer, ema):
    ema.state["x_embedder.bias"][0] = torch.nan


def spoil_moments(optimizer, ema):
    optimizer.state[optimizer.param_groups[0]["params"][-1]]["exp_avg_sq"].view(-1)[0] = torch.inf


@pytest.mark.parametrize(
    ("spoil", "step", "message"),
    [
        (spoil_gradient, 2, "the gradient norm is nan at step 3;"),
        (spoil_weights, 3, "the weights are not finite at step 3;"),
        (spoil_averages, 3, "the averaged weights are not finite at step 3;"),
        (spoil_moments, 3, "the moments of the optimiser are not finite at step 3;"),
    ],
)
def test_what_diverged_is_named_before_it_is_saved(config, monkeypatch, spoil, step, message):
    """Between two records, in the step after a checkpoint."""
    optimizers, steps, update = [], itertools.count(1), EMA.update

    def spoiled_update(self):
        update(self)
        if next(steps) == step:
            spoil(optimizers[0], self)

    hook = register_optimizer_step_post_hook(lambda optimizer, *arguments: optimizers.append(optimizer))
    monkeypatch.setattr(EMA, "update", spoiled_update)
    settings = config("run.log_every=50", "run.checkpoint_every=1", "run.keep_checkpoints=1")
    with pytest.raises(FloatingPointError, match=f"^{message}"):
        train(settings)
    hook.remove()
    assert ckpt.read_trainer(settings.run.out)["step"] == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [("DC-DiT-S", "the router's probabilities are not finite at step 1;"), ("DiT-S/2", "the loss is")],
)
def test_images_that_overflow(config, tmp_path, name, message):
    path = tmp_path / "huge.npz"
    np.savez(path, latents=np.full((8, 3, 8, 8), 3e38, np.float32), labels=np.zeros(8, int))
    with pytest.raises(FloatingPointError, match=message):
        train(override(config(f"model.name={name}"), {"data.path": str(path)}))
