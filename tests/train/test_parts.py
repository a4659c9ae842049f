"""The parts of the loop: averaged weights, schedules, validation, the log."""

import json

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from dcdit.config import OptimSection, RouterSection
from dcdit.diffusion import DiTObjective, FlowMatchingObjective
from dcdit.train import EMA, matched_steps
from dcdit.train.records import MetricMeans, append, cut_log
from dcdit.train.schedule import compression_target, drop_fraction, learning_rate, seed_of
from dcdit.train.validate import validate


def test_ema_by_hand():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    ema = EMA(model, decay=0.75)
    # 1 -> 0.75 * 1 + 0.25 * 5 = 2 -> 0.75 * 2 + 0.25 * 10 = 4
    for weight, expected in ((5.0, 2.0), (10.0, 4.0)):
        nn.init.constant_(model.weight, weight)
        ema.update()
        assert ema.state["weight"].item() == expected
    assert model.weight.item() == 10.0


def test_ema_follows_weights_that_are_moved():
    """Wrapping a model for several processes gives its parameters other storage."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    ema = EMA(model, decay=0.5)
    model.weight.data = torch.full((1, 1), 3.0)
    ema.update()
    assert ema.state["weight"].item() == 2.0


def test_ema_keeps_buffers_and_continues():
    model = nn.BatchNorm1d(3)
    ema = EMA(model, 0.5)
    assert ema.state.keys() == model.state_dict().keys()
    nn.init.constant_(model.weight, 3.0)
    ema.update()
    other = EMA(nn.BatchNorm1d(3), 0.5)
    other.load(ema.state)
    assert all(torch.equal(other.state[name], ema.state[name]) for name in ema.state)


def test_learning_rate():
    optim = OptimSection(lr=1.0, warmup_steps=4)
    assert [learning_rate(optim, step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert learning_rate(OptimSection(lr=0.5), 0) == 0.5


def test_drop_fractions():
    router = RouterSection(drop_fractions=[0.1, 0.2, 0.3], drop_warmup_steps=10)
    drawn = [drop_fraction(router, 0, step) for step in range(310)]
    assert drawn[:10] == [0.0] * 10
    assert drawn == [drop_fraction(router, 0, step) for step in range(310)]
    assert drawn != [drop_fraction(router, 1, step) for step in range(310)]
    # 300 draws of 3: each count is 100 with a standard deviation of 8.2.
    assert all(60 < drawn[10:].count(rho) < 140 for rho in router.drop_fractions)


def test_compression_target():
    router = RouterSection(target=16.0, target_start=4.0, target_warmup_steps=4)
    assert [compression_target(router, step) for step in range(6)] == [4, 7, 10, 13, 16, 16]
    assert compression_target(RouterSection(target=3.0), 0) == 3


def test_seeds_differ():
    seeds = {seed_of(seed, stream, step) for seed in range(5) for stream in range(2) for step in range(50)}
    assert len(seeds) == 500
    assert all(0 <= seed < 2**63 for seed in seeds)


class Numbers(torch.utils.data.Dataset):
    shape, class_names = (1, 1, 1), ("all",)

    def __getitem__(self, n):
        return torch.full(self.shape, float(n)), 0


@pytest.mark.parametrize("objective", [DiTObjective(learn_sigma=False), FlowMatchingObjective()])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 10])
def test_validation_is_a_mean_over_exactly_the_images(objective, batch_size):
    """Every image once, with a timestep and noise of its own that do not depend on how they are batched."""
    expected = 0.0
    for n in range(5):
        t, noise = objective.draw((1, 1, 1, 1), torch.device("cpu"), torch.Generator().manual_seed(n))
        x = torch.full((1, 1, 1, 1), float(n))
        expected += objective.losses(lambda x, t, y: 2 * x, x, torch.zeros(1), t, noise)["loss"].item() / 5

    def predict(x, t, y):
        assert not torch.is_grad_enabled()
        return 2 * x

    assert validate(predict, objective, Numbers(), 5, batch_size, torch.device("cpu")) == pytest.approx(expected)


def test_metrics_are_averaged_and_cleared():
    means = MetricMeans()
    for value in (1.0, 2.0, 6.0):
        means.add({"loss": torch.tensor(value), "kept": torch.tensor(value / 10)}, images=4)
    assert means.read(3, Accelerator(cpu=True)) == {"loss": pytest.approx(3.0), "kept": pytest.approx(0.3)}
    assert means.images == 12 and means.images_per_second() > 0
    means.clear()
    assert means.images == 0 and not means.values


def test_matched_steps():
    """By hand: 10 per step up to step 20, 5 per step from there."""
    records = [{"step": step, "flops": 10 * min(step, 20) + 5 * max(step - 20, 0)} for step in (10, 20, 40, 60)]
    records.insert(1, {"step": 10, "val_loss": 1.0})
    assert [matched_steps(flops, records) for flops in (1, 100, 205, 395, 500)] == [1, 10, 21, 59, 80]
    assert matched_steps(30, records[:1]) == 3
    with pytest.raises(ValueError, match="no record has flops"):
        matched_steps(1, [{"step": 10}])


def test_log_is_cut_at_the_resumed_step(tmp_path):
    log = tmp_path / "log.jsonl"
    cut_log(log, 3)
    assert not log.exists()
    for step in (1, 2, 3, 4, 5):
        append(log, {"step": step})
    cut_log(log, 3)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3]


def test_a_torn_line_of_the_log_goes(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n{"step": 2, "los')
    cut_log(log, 9)
    assert log.read_text() == '{"step": 1}\n'
