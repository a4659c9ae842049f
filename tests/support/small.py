"""Small models in which every weight has an effect: none stays at the zeros of adaLN-Zero."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dcdit.checkpoint import save_model
from dcdit.models import DCDiT, DCDiTConfig, DiT, DiTConfig, DyDiT, DyDiTConfig, ModelConfig, SparseDiT, SparseDiTConfig

GRID = (8, 12)
SIZES = {"hidden_size": 128, "depth": 2, "num_heads": 4, "num_classes": 10}


def small_dc_dit(**overrides) -> DCDiT:
    torch.manual_seed(0)
    model = DCDiT(DCDiTConfig(**{"grid": GRID, **SIZES, **overrides}))
    randomize_zero_weights(model)
    if model.config.router in ("predictability", "dithered"):
        # Spread the probabilities around one half, so that every image keeps some tokens and drops others.
        nn.init.normal_(model.router.out.weight, std=1.0)
        nn.init.constant_(model.router.out.bias, -0.4)
    return model.eval()


def small_dit(**overrides) -> DiT:
    torch.manual_seed(0)
    model = DiT(DiTConfig(**{"grid": GRID, **SIZES, **overrides}))
    randomize_zero_weights(model)
    return model.eval()


def small_dy_dit(**overrides) -> DyDiT:
    torch.manual_seed(0)
    model = DyDiT(DyDiTConfig(**{"grid": GRID, **SIZES, **overrides}))
    randomize_zero_weights(model)
    open_some_gates(model)
    return model.eval()


SPARSE = {"depth": 10, "modules": 2, "sparse_depth": 1, "sparse_grid": (3, 4), "hidden_size": 64}


def small_sparse_dit(**overrides) -> SparseDiT:
    torch.manual_seed(0)
    model = SparseDiT(SparseDiTConfig(**{"grid": GRID, **SIZES, **SPARSE, **overrides}))
    randomize_zero_weights(model)
    return model.eval()


def small_dynamic_dc_dit(**overrides) -> DCDiT:
    model = small_dc_dit(dynamic_width=True, **overrides)
    open_some_gates(model)
    return model


def open_some_gates(model: DyDiT | DCDiT) -> None:
    """Of heads, MLP groups and tokens about a half, which ones by the timestep and the token."""
    nn.init.normal_(model.width_gates.linear.weight)
    nn.init.zeros_(model.width_gates.linear.bias)
    for gate in getattr(model, "token_gates", ()):
        nn.init.normal_(gate.fc2.weight)
        nn.init.constant_(gate.fc2.bias, -0.3)


def randomize_zero_weights(model: nn.Module) -> None:
    """Zeros would hide whole branches of the model."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)


def save_diverged(path: Path, model: DCDiT | DiT) -> None:
    """A file of the model with one weight that is NaN, as :func:`dcdit.checkpoint.save_model` refuses to write it."""
    save_model(path, model)
    with safe_open(path, framework="pt") as file:
        metadata, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    weights["x_embedder.bias"][0] = torch.nan
    save_file(weights, path, metadata)


def batch(config: ModelConfig, size: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(size, config.in_channels, *config.grid, generator=rng)
    t = torch.randint(0, 1000, (size,), generator=rng)
    return x, t, torch.randint(0, config.num_classes, (size,), generator=rng)
