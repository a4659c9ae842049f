"""Static sizes: rounded up within a wave of tiles, and large enough as often as they say."""

import math

import pytest
import torch
from support.small import batch, small_dc_dit

from dcdit import checkpoint
from dcdit.models import KeptShare, create_config, plan_capacity
from dcdit.sample import Guidance, measure_kept_share

XL = create_config("DC-DiT-XL")


def exactly(rows: int, images: int = 32) -> KeptShare:
    """All images keep the same, ``rows`` together."""
    share = rows / images / math.prod(XL.grid)
    return KeptShare(share, 0.0, share, 1000)


def waves(rows: int, multiprocessors: int, tile: tuple[int, int]) -> list[int]:
    """Of the four products of a block, counted one by one."""
    dim, hidden = XL.hidden_size, 4 * XL.hidden_size
    tiles = [math.ceil(rows / tile[0]) * math.ceil(width / tile[1]) for width in (3 * dim, dim, hidden, dim)]
    return [math.ceil(count / multiprocessors) for count in tiles]


@pytest.mark.parametrize(("needed", "rows"), [(8192, 8448), (8448, 8448), (8449, 9344), (2700, 2816), (3277, 3328)])
def test_edges_of_a_gpu_with_132_multiprocessors(needed: int, rows: int) -> None:
    assert plan_capacity(XL, 32, exactly(needed), multiprocessors=132).capacity == rows


@pytest.mark.parametrize(("multiprocessors", "tile"), [(132, (128, 256)), (108, (128, 128)), (148, (256, 128))])
def test_every_row_up_to_the_edge_costs_the_same_waves_and_the_next_one_more(
    multiprocessors: int, tile: tuple[int, int]
) -> None:
    for needed in range(1500, 20_000, 731):
        found = plan_capacity(XL, 32, exactly(needed), multiprocessors=multiprocessors, tile=tile).capacity
        assert waves(found, multiprocessors, tile) == waves(needed, multiprocessors, tile)
        assert waves(found + 1, multiprocessors, tile) != waves(needed, multiprocessors, tile)


def test_less_than_a_wave_is_rounded_to_tiles() -> None:
    assert plan_capacity(XL, 1, exactly(300, 1), multiprocessors=132).capacity == 384


def test_never_more_than_all_positions_nor_less_than_an_image_needs() -> None:
    everything = plan_capacity(XL, 2, KeptShare(1.0, 0.0, 1.0, 10), multiprocessors=132)
    assert everything == (2048, 1024, 0.0)
    assert plan_capacity(XL, 5, KeptShare(0.0, 0.0, 0.0, 10)).capacity == 5


def test_it_overflows_as_often_as_it_says() -> None:
    """Images that keep a normally distributed share, each image with its own drop fraction."""
    share, images, calls = KeptShare(0.4, 0.05, 0.55, 100), 16, 20_000
    rho = [0.0] * 8 + [0.7] * 8
    plan = plan_capacity(XL, images, share, rho, sigmas=1.5)
    generator = torch.Generator().manual_seed(0)
    error = torch.randn(calls, 1, generator=generator) / math.sqrt(share.images)  # of the measured mean
    shares = share.mean + share.std * (torch.randn(calls, images, generator=generator) + error)
    natural = (shares * 1024).round()
    kept = natural - (natural * torch.tensor(rho)).floor()
    overflow = (kept.sum(1) > plan.capacity) | (kept.amax(1) > plan.max_seqlen)
    assert overflow.double().mean() == pytest.approx(plan.overflow_probability, rel=0.1)
    assert plan.max_seqlen % 128 == 0 or plan.max_seqlen == 1024
    less = plan_capacity(XL, images, share, rho, sigmas=3.0)
    assert less.capacity > plan.capacity and less.overflow_probability < 0.003


def test_share_of_the_call_that_kept_most() -> None:
    share = KeptShare.of_calls([[0.0, 0.25, 0.5], [0.25, 0.5, 0.75], [1.0, 0.0, 0.0]])
    assert share == KeptShare(0.5, 0.25, 0.75, 3)
    assert KeptShare.of_calls([[0.3] * 3]).std == 0  # a mean that is rounded up is no error


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: KeptShare(1.2, 0.0, 1.0, 9), "mean=1.2"),
        (lambda: KeptShare(0.3, 0.1, 0.2, 9), "mean <= largest"),
        (lambda: KeptShare(0.3, 0.1, 0.4, 1), "images >= 2"),
        (lambda: KeptShare.of_calls([[0.5]]), "at least 2"),
        (lambda: KeptShare.of_calls([]), "shares of 0 images"),
        (lambda: plan_capacity(XL, 0, exactly(9)), "batch is 0"),
        (lambda: plan_capacity(XL, 3, exactly(9), [0.1, 0.2]), "2 drop fractions"),
        (lambda: plan_capacity(XL, 1, exactly(9), 1.0), "drop_fraction is 1.0"),
        (lambda: plan_capacity(XL, 1, exactly(9), sigmas=0), "sigmas is 0"),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@torch.no_grad()
def test_measured_saved_and_used(tmp_path) -> None:
    model = small_dc_dit().eval()
    x, t, y = batch(model.config)
    with pytest.raises(ValueError, match="kept_share is None"):
        model(x, t, y, capacity="auto")
    model.kept_share = measure_kept_share(
        model, torch.arange(4), 4, "ddim", Guidance(1.5, null_drop_fraction=0.9), 0.2, progress=False
    )
    assert model.kept_share.images == 8 and model.kept_share.std > 0
    checkpoint.save_model(tmp_path / "model.safetensors", model)
    loaded = checkpoint.load_model(tmp_path / "model.safetensors")
    assert loaded.kept_share == model.kept_share
    out, routing = loaded(x, t, y, drop_fraction=0.3, capacity="auto", return_routing=True)
    plan = model.plan_capacity(len(x), 0.3)
    assert routing.selection.indices.shape[0] == plan.capacity
    assert routing.selection.max_seqlen == plan.max_seqlen
    assert int(routing.selection.overflow) == 0
    torch.testing.assert_close(out, model(x, t, y, drop_fraction=0.3))
    with pytest.raises(ValueError, match="in a tensor"):
        model(x, t, y, drop_fraction=torch.zeros(3), capacity="auto")


def test_a_damaged_share_is_named(tmp_path) -> None:
    for text in ("{", "3", '{"mean": 2, "std": 0, "largest": 1, "images": 5}', '{"average": 1}', '{"mean": "a"}'):
        checkpoint.save_model(tmp_path / "model.safetensors", small_dc_dit(), notes={"kept_share": text})
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged: its kept_share is"):
            checkpoint.load_model(tmp_path / "model.safetensors")
