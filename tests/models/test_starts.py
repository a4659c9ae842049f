"""The named starts of a DC-DiT: each gives the weights that it says, and leaves every other weight alone."""

import math

import pytest
import torch
from support.small import GRID, SIZES

from dcdit.models import DCDiT, DCDiTConfig
from dcdit.models.starts import STARTS

PARTS = {"residual_proj.weight", "residual_proj.bias", "router.out.bias"}


def model_with(start: str, **values) -> DCDiT:
    torch.manual_seed(0)
    return DCDiT(DCDiTConfig(grid=GRID, start=start, **{**SIZES, **values}))


def is_xavier(weight: torch.Tensor, fan_out: int) -> bool:
    """Uniform between the bounds that ``nn.init.xavier_uniform_`` takes for a matrix of ``fan_out`` rows."""
    bound = math.sqrt(6 / (weight.shape[1] + fan_out))
    return bool(weight.abs().max() <= bound) and abs(weight.std() * math.sqrt(3) / bound - 1) < 0.02


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("separate", [False, True])
def test_each_start_is_what_it_says(start, separate):
    model, said = model_with(start, separate_embedders=separate), STARTS[start]
    residual = model.residual_proj.weight
    found = {
        "zero": not residual.any(),
        "identity": torch.equal(residual, torch.eye(len(residual))),
        "xavier": is_xavier(residual, len(residual)),
    }
    assert [name for name, yes in found.items() if yes] == [said.residual]
    linears = [module for module in model.modulation.modules() if isinstance(module, torch.nn.Linear)]
    for linear in linears:
        zero, xavier = not linear.weight.any(), is_xavier(linear.weight, 6 * linear.in_features)
        assert (zero, xavier) == (said.modulation == "zero", said.modulation == "xavier")
    assert not any(linear.bias.any() for linear in [*linears, model.residual_proj])
    assert (model.router.out.bias == -1.1).item() == (said.kept_share is None)


@pytest.mark.parametrize("start", STARTS)
def test_a_start_leaves_all_other_weights_alone(start):
    paper, other = model_with("paper").state_dict(), model_with(start).state_dict()
    changed = {name for name, value in paper.items() if not torch.equal(value, other[name])}
    assert changed <= PARTS | {name for name in paper if name.startswith("modulation.")}


def test_the_share_is_that_of_normal_features():
    router = model_with("share").router
    z = torch.randn(100_000, router.out.in_features)
    kept = (router.out(torch.nn.functional.silu(z)) > 0).float().mean()
    assert abs(kept - STARTS["share"].kept_share) < 0.03


def test_an_unknown_start_is_named():
    with pytest.raises(ValueError, match="start is 'warm'; accepted: paper, official"):
        model_with("warm")


@pytest.mark.parametrize("start", STARTS)
def test_a_dithered_router_starts_at_a_quarter_everywhere(start):
    router = model_with(start, router="dithered").router
    kept = (router(torch.randn(4, math.prod(GRID), SIZES["hidden_size"])) > 0.5).unflatten(1, GRID)
    cells = kept[:, : GRID[0] // 4 * 4, : GRID[1] // 4 * 4].unfold(1, 4, 4).unfold(2, 4, 4).sum((3, 4))
    assert abs(cells[:, :-1].float().mean() - 4) < 0.7 and cells.min() >= 1 and cells[:, :-1].max() <= 9
