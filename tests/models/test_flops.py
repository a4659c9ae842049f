"""The analytic FLOPs against the papers, and against PyTorch's counter stage by stage."""

import pytest
import torch
from support.stages import counted_stages

from dcdit import ops
from dcdit.models import DCDiT, DCDiTConfig, DiT, DiTConfig, count_flops, create_config
from dcdit.models.flops import SOFTMAX_FLOPS

STEPS = 250
SMALL = {"grid": (8, 12), "hidden_size": 128, "depth": 2, "num_heads": 4, "num_classes": 10}


def tera_per_image(config, lengths=None) -> float:
    return STEPS * count_flops(config, lengths)["total"] / 1e12


@pytest.mark.parametrize(("scale", "published"), [("S", 3.02), ("B", 11.46), ("L", 40.21), ("XL", 59.00)])
def test_static_sizes_match_the_paper(scale: str, published: float) -> None:
    assert tera_per_image(create_config(f"DiT-{scale}/2")) == pytest.approx(published, rel=0.02)


def test_one_natural_length_explains_the_published_budgets() -> None:
    """DC-DiT-XL at rho = 0, 0.2, 0.4: the kept tokens that give the first number predict the other two."""
    config = create_config("DC-DiT-XL")
    natural = min(range(1, 1025), key=lambda kept: abs(tera_per_image(config, kept) - 62.99))
    for rho, published in ((0.2, 51.60), (0.4, 40.26)):
        assert tera_per_image(config, natural - int(natural * rho)) == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize(
    ("scale", "rho", "published"),
    [("S", 0.2, 3.06), ("B", 0.2, 11.94), ("L", 0.1, 39.61), ("XL", 0.0, 62.99)],
)
def test_published_budgets_imply_the_target_compression(scale: str, rho: float, published: float) -> None:
    """All four sizes were trained for N = 4: each published number must come from about a quarter of the tokens."""
    config = create_config(f"DC-DiT-{scale}")
    natural = min(
        range(1, 1025), key=lambda kept: abs(tera_per_image(config, max(1, kept - int(kept * rho))) - published)
    )
    assert 4.0 <= 1024 / natural <= 4.4


@pytest.mark.parametrize("cell_context", [False, True])
@pytest.mark.parametrize("router", ["predictability", "dithered", "cosine2d", "cosine1d", "uniform"])
def test_dynamic_stages_match_pytorchs_counter(router: str, cell_context: bool) -> None:
    config = DCDiTConfig(**SMALL, router=router, dechunk="ema", cell_context=cell_context)
    model = DCDiT(config).eval()
    batch, positions, budget = 3, 96, 17
    inputs = torch.randn(batch, 4, 8, 12), torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3])
    with ops.use_backend("reference"):
        counted = counted_stages(lambda: model(*inputs, budget=budget))
    ours = count_flops(config, budget, batch=batch)
    # The papers add 3 FLOPs per attention score for the softmax; PyTorch counts the two products only.
    ours["transformer"] -= config.depth * config.num_heads * batch * budget**2 * SOFTMAX_FLOPS
    if router.startswith("cosine"):
        # The dot product of q and k is elementwise work to PyTorch, and so is the 3x3 filter of each channel.
        taps = 1 + 9 * (router == "cosine2d")
        ours["router"] -= taps * 2 * batch * positions * config.hidden_size
    assert counted == {name: ours[name] for name in counted}
    assert counted.keys() == ours.keys() - {"total"}


def test_static_stages_match_pytorchs_counter() -> None:
    config = DiTConfig(**SMALL, patch_size=2)
    model = DiT(config).eval()
    inputs = torch.randn(3, 4, 8, 12), torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        counted = counted_stages(lambda: model(*inputs))
    ours = count_flops(config, batch=3)
    ours["transformer"] -= config.depth * config.num_heads * 3 * 24**2 * SOFTMAX_FLOPS
    assert counted == {name: ours[name] for name in counted}
    assert ours["total"] == count_flops(config)["total"] * 3


def test_lengths_are_summed_per_image() -> None:
    config = DCDiTConfig(**SMALL)
    each = [count_flops(config, length) for length in (3, 50, 96)]
    assert count_flops(config, [3, 50, 96]) == {name: sum(one[name] for one in each) for name in each[0]}
    assert count_flops(config) == count_flops(config, 96)
    assert count_flops(config)["total"] == sum(flops for name, flops in count_flops(config).items() if name != "total")


@pytest.mark.parametrize(
    ("config", "args", "message"),
    [
        (DiTConfig(**SMALL), (10,), "a static DiT keeps every token"),
        (DCDiTConfig(**SMALL), (97,), "1 to 96"),
        (DCDiTConfig(**SMALL), ([3, 0],), "1 to 96"),
        (DCDiTConfig(**SMALL), ([3, 4], 3), "one per image"),
    ],
)
def test_bad_lengths(config, args, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        count_flops(config, *args)
