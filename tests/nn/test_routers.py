import pytest
import torch
import torch.nn.functional as F

from dcdit.nn import ROUTERS, Cosine1dRouter, Cosine2dRouter, DitheredRouter, PredictabilityRouter, UniformRouter

GRID = (5, 7)
DIM = 64


def tokens(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 35, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)


def test_predictability_is_what_the_convolution_cannot_predict() -> None:
    torch.manual_seed(0)
    router = PredictabilityRouter(DIM, GRID).double()
    x = tokens(torch.float64)
    z = router.proj(x).transpose(1, 2).unflatten(2, GRID)
    features = router.scorer(z - router.predictor(z))
    features = F.silu(F.group_norm(features, 8, router.norm.weight, router.norm.bias)).flatten(2).transpose(1, 2)
    expected = torch.sigmoid(router.out(features))[..., 0]
    expected[:, [0, -1]] = 1.0
    torch.testing.assert_close(router(x), expected)


def test_cosine2d_starts_as_the_distance_to_the_mean_neighbour() -> None:
    x = tokens(torch.float64)
    unit = F.normalize(x, dim=-1).transpose(1, 2).unflatten(2, GRID)
    mean = F.avg_pool2d(unit, 3, stride=1, padding=1)
    torch.testing.assert_close(Cosine2dRouter(DIM, GRID).double()(x), ((1 - (unit * mean).sum(1)) / 2).flatten(1))


def test_cosine1d_starts_as_the_distance_to_the_previous_token() -> None:
    x = tokens(torch.float64)
    expected = (1 - F.cosine_similarity(x[:, :-1], x[:, 1:], dim=-1)) / 2
    found = Cosine1dRouter(DIM, GRID).double()(x)
    torch.testing.assert_close(found[:, 1:], expected)
    assert (found[:, 0] == 1).all()


@pytest.mark.parametrize("name", ROUTERS)
def test_probability_is_float32_whatever_the_precision(name: str) -> None:
    torch.manual_seed(0)
    router = ROUTERS[name](DIM, GRID)
    exact = router(tokens())
    with torch.autocast("cpu", torch.bfloat16):
        autocast = router(tokens())
    half = router.bfloat16()(tokens(torch.bfloat16))
    for p in (exact, autocast, half):
        assert p.dtype == torch.float32
        assert p.shape == (2, 35)
        assert ((p >= 0) & (p <= 1)).all()
        assert (p - exact).abs().max() < 0.02


@pytest.mark.parametrize("case", ["float64", "float32", "autocast", "bfloat16"])
def test_modules_that_are_called_give_the_same_probability(case: str) -> None:
    """Each module is called, because it has a hook. The hooks do nothing."""
    torch.manual_seed(0)
    dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(case, torch.float32)
    tolerance = {"float64": 1e-12, "float32": 1e-5}.get(case, 0.02)
    router = PredictabilityRouter(DIM, GRID).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        fused = router(tokens(dtype))
        for module in (router.predictor, router.norm, router.out):
            module.register_forward_hook(lambda *_: None)
        called = router(tokens(dtype))
    assert called.dtype == fused.dtype == (torch.float64 if case == "float64" else torch.float32)
    assert (called[:, [0, -1]] == 1).all()
    torch.testing.assert_close(called, fused, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["cosine2d", "cosine1d"])
def test_cosine_is_computed_in_float32_under_autocast(name: str) -> None:
    """Tokens, identity projections and filter are exact in bfloat16 here, so any difference is the router's own."""
    router, x = ROUTERS[name](DIM, GRID), tokens().bfloat16().float()
    if name == "cosine2d":
        torch.nn.init.constant_(router.filter, 1 / 8)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = router(x)
    assert torch.equal(rounded, router(x))


@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "uniform"])
def test_every_parameter_learns(name: str) -> None:
    torch.manual_seed(0)
    router = ROUTERS[name](DIM, GRID)
    weights = torch.randn(2, 35)
    (router(tokens()) * weights).sum().backward()
    for key, parameter in router.named_parameters():
        assert parameter.grad is not None and parameter.grad.norm() > 0, key


def test_a_dithered_router_of_a_bfloat16_model_ranks_its_cells_in_float32() -> None:
    """Scores rounded to bfloat16 would be equal in many cells, and then the raster order would say what is dropped."""
    torch.manual_seed(0)
    router = DitheredRouter(DIM, (64, 64)).bfloat16()
    p = router(torch.randn(1, 4096, DIM).bfloat16())[0].view(64, 64)[2::4, ::4].flatten()
    assert len(p.unique()) > 0.95 * len(p)


BAYER = torch.tensor([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]])
"""Bayer 1973, figure 4."""


def test_a_dithered_position_is_kept_where_the_share_of_its_cell_is_above_its_entry() -> None:
    torch.manual_seed(0)
    grid = (9, 14)  # 3 x 4 cells, the last ones smaller
    router, plain = DitheredRouter(DIM, grid).double(), PredictabilityRouter(DIM, (3, 4)).double()
    torch.nn.init.normal_(router.out.weight)
    plain.load_state_dict(router.state_dict())
    x = torch.randn(2, 9, 14, DIM, dtype=torch.float64)
    means = [x[:, r : r + 4, c : c + 4].mean((1, 2)) for r in (0, 4, 8) for c in (0, 4, 8, 12)]
    share = torch.sigmoid(plain.score(plain.scorer(plain.prediction_error(on_grid(plain.proj(torch.stack(means, 1)))))))
    share = share.view(2, 3, 4)
    assert share.min() < 0.1 and share.max() > 0.6
    p = router(x.flatten(1, 2))
    row, column = torch.meshgrid(torch.arange(9), torch.arange(14), indexing="ij")
    threshold, share = (2 * BAYER[row % 4, column % 4] + 1).double() / 32, share[:, row // 4, column // 4]
    odds = (share / (1 - share) * (1 - threshold) / threshold) ** 4
    torch.testing.assert_close(p[:, 1:-1], (odds / (1 + odds)).flatten(1)[:, 1:-1])
    assert torch.equal((p > 0.5)[:, 1:-1], (share > threshold).flatten(1)[:, 1:-1])
    assert (p[:, [0, -1]] == 1).all()


def on_grid(cells: torch.Tensor) -> torch.Tensor:
    """(B, 12, C) -> (B, C, 3, 4)."""
    return cells.transpose(1, 2).unflatten(2, (3, 4))


@pytest.mark.parametrize(("share", "kept_of_16"), [(0.07, 1), (0.25, 4), (0.55, 9), (0.97, 16)])
def test_a_constant_share_is_spaced_evenly(share: float, kept_of_16: int) -> None:
    router = DitheredRouter(DIM, (8, 12))
    torch.nn.init.zeros_(router.out.weight)
    torch.nn.init.constant_(router.out.bias, float(torch.tensor(share).logit()))
    kept = (router(torch.randn(1, 96, DIM)) > 0.5).view(8, 12).int()
    kept[-1, -1] = kept[3, 3]  # the last position is always kept
    cells = kept.unfold(0, 4, 4).unfold(1, 4, 4).sum((2, 3))
    assert cells.eq(kept_of_16).all()
    if kept_of_16 == 4:
        assert torch.equal(kept.nonzero() % 2, torch.zeros(24, 2).long())


@pytest.mark.parametrize("grid", [(8, 8), (5, 7), (1, 6), (16, 4)], ids=str)
def test_the_uniform_router_keeps_every_second_position_of_every_second_row(grid: tuple[int, int]) -> None:
    p = UniformRouter(DIM, grid)(torch.randn(2, grid[0] * grid[1], DIM)).unflatten(1, grid)
    regular = torch.zeros(2, *grid, dtype=torch.bool)
    regular[:, ::2, ::2] = True
    assert torch.equal(p > 0.5, regular)
    assert len(p[0].unique()) == p[0].numel()  # no order is left to chance


@pytest.mark.parametrize("count", [1, 4, 16, 32, 64])
def test_any_budget_of_the_uniform_router_is_spread_evenly(count: int) -> None:
    p = UniformRouter(DIM, (8, 8))(torch.zeros(1, 64, DIM))
    kept = torch.zeros(64).index_fill(0, p.topk(count).indices[0], 1).view(8, 8)
    side = {1: 8, 4: 4, 16: 2, 32: 2, 64: 1}[count]  # of cells that have equally many each
    cells = kept.unfold(0, side, side).unfold(1, side, side).sum((2, 3))
    assert cells.min() == cells.max() == count // cells.numel()
