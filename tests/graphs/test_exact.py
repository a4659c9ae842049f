"""Exact mode: what runs while its size is read, and the part after the selection as a graph for each size."""

import math

import pytest
import torch
from support import capturable_attention, fake_device
from support.fake_device import FakeDriver
from support.small import GRID, batch, small_dc_dit

from dcdit.graphs import ExactGraphedDenoiser
from dcdit.graphs.exact import size_of
from dcdit.models import DCDiT, create_config

POSITIONS = GRID[0] * GRID[1]
IMAGES = 3


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    capturable_attention.install(monkeypatch, POSITIONS)
    return fake_device.install(monkeypatch)


def inputs(model: DCDiT, seed: int, images: int = IMAGES) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, t, y = batch(model.config, images)
    return x + 0.3 * seed, (t + 100 * seed) % 1000, (y + seed) % 10


@torch.no_grad()
def test_independent_products_run_while_the_size_is_read(fake: FakeDriver) -> None:
    """The modulation of all blocks and the residual projection stand between the copy of the size and the wait."""
    model = small_dc_dit()
    args = inputs(model, 0)
    with fake.operators():
        model(*args)
    assert fake.calls.count("wait") == 1
    copied, waited = fake.calls.index("record"), fake.calls.index("wait")
    between = [call for call in fake.calls[copied:waited] if call in ("aten.addmm", "aten.mm", "aten.linear")]
    assert len(between) == 2
    assert "aten._local_scalar_dense" not in fake.calls


@torch.no_grad()
def test_a_static_size_is_not_read(fake: FakeDriver) -> None:
    model = small_dc_dit()
    for options in ({"budget": 9}, {"capacity": 100}):
        model(*inputs(model, 0), **options)
    assert "wait" not in fake.calls and "pinned" not in fake.calls


@torch.no_grad()
def test_graphs_give_the_bits_of_exact_mode(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dcdit.graphs.exact.size_of", lambda total, *_: -(-total // 32) * 32)
    model = small_dc_dit()
    graphed = ExactGraphedDenoiser(model)
    rows = set()
    for seed in range(3):
        for rho in (0.0, 0.4, torch.tensor([0.0, 0.5, 0.9])):
            args = inputs(model, seed)
            expected, routing = model(*args, drop_fraction=rho, return_routing=True)
            out, found = graphed(*args, drop_fraction=rho, return_routing=True)
            assert torch.equal(out, expected)
            for mine, theirs in zip(found.selection, routing.selection, strict=True):
                assert torch.equal(mine, theirs) if isinstance(theirs, torch.Tensor) else mine == theirs
            assert torch.equal(found.prob, routing.prob)
            rows.add(-(-routing.selection.indices.shape[0] // 32))
    assert len(rows) > 2, "several sizes"
    assert len(fake.graphs) <= 2 + 2 * len(rows)
    before = len(fake.graphs)
    graphed(*args, drop_fraction=rho)
    assert len(fake.graphs) == before, "a known size is not captured again"


@torch.no_grad()
def test_results_outlive_the_next_call(fake: FakeDriver) -> None:
    model = small_dc_dit()
    graphed = ExactGraphedDenoiser(model)
    first = graphed(*inputs(model, 0))
    kept = first.clone()
    graphed(*inputs(model, 1))
    assert torch.equal(first, kept)


@torch.no_grad()
def test_sizes_and_batches_are_bounded(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dcdit.graphs.exact.size_of", lambda total, *_: total)
    model = small_dc_dit()
    graphed = ExactGraphedDenoiser(model, max_graphs=2)
    for rho in (0.0, 0.3, 0.6, 0.9):
        graphed(*inputs(model, 0), drop_fraction=rho)
    assert len(graphed._batches[IMAGES, None]._decoded) == 2
    for images in range(1, 7):
        graphed(*inputs(model, 0, images))
    assert [images for images, _ in graphed._batches] == [3, 4, 5, 6]


@torch.no_grad()
def test_the_host_starts_few_things_per_call(fake: FakeDriver) -> None:
    model = small_dc_dit()
    graphed = ExactGraphedDenoiser(model)
    args = inputs(model, 0)
    graphed(*args)
    fake.calls.clear()
    with fake.operators():
        model(*args)
    eager = len(fake.calls)
    fake.calls.clear()
    graphed(*args)
    order = [call.split()[0] for call in fake.calls]
    assert order == ["replay", "pinned", "record", "replay", "wait", "replay"]
    assert eager > 100


@pytest.mark.parametrize("total", [1, 128, 129, 2000, 8192, 8200, 8449, 31_000])
def test_slack_costs_no_wave(total: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """DC-DiT-XL on 132 multiprocessors: as many waves of tiles as the tokens alone, in each product of a block."""
    monkeypatch.setattr("dcdit.graphs.exact.multiprocessors_of", lambda device: 132)
    config = create_config("DC-DiT-XL")
    rows = size_of(total, config, torch.device("cpu"))
    assert rows >= total and rows % 128 == 0
    for width in (3 * 1152, 1152, 4 * 1152):
        waves = [math.ceil(math.ceil(count / 128) * math.ceil(width / 256) / 132) for count in (total, rows)]
        assert waves[0] == waves[1]
    monkeypatch.undo()
    assert size_of(total, config, torch.device("cpu")) == 128 * math.ceil(total / 128)
