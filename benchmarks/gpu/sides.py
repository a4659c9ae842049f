"""The models of a comparison with random weights, the same for inference and training."""

import torch
from torch import Tensor, nn

from benchmarks.gpu.setting import Setting
from dcdit.models import DCDiT, DiT, create_model
from dcdit.nn.memory_format import channels_last
from dcdit.profiling.calibrate import calibrate_router, varied_latents

KEEP = 0.25
"""Of the positions, by the router of the untrained model, before any is dropped."""
Batch = tuple[Tensor, Tensor, Tensor]


def create_dynamic(setting: Setting) -> DCDiT:
    """The DC-DiT, float32, on the device."""
    with setting.device:
        model = create_model(f"DC-DiT-{setting.scale}", setting.image_size, **setting.overrides)
    assert isinstance(model, DCDiT)
    return channels_last(_without_zeros(model))


def create_static(setting: Setting) -> DiT:
    """The static DiT with the same transformer and patches of 2, float32, on the device."""
    with setting.device:
        model = create_model(f"DiT-{setting.scale}/2", setting.image_size, **setting.overrides)
    assert isinstance(model, DiT)
    _without_zeros(model)
    return model


def create_batch(model: DCDiT, size: int) -> Batch:
    """Latents that differ in roughness, so that images keep different numbers of tokens, with times and labels."""
    device = model.pos_embed.device
    x = varied_latents(size, model.config.in_channels, model.config.grid).to(device)
    return x, torch.linspace(0, 999, size, device=device).long(), torch.arange(size, device=device)


def calibrate(model: DCDiT, batch: Batch) -> None:
    """Make the router keep a quarter of the batch."""
    calibrate_router(model, *batch, KEEP)


@torch.no_grad()
def _without_zeros(model: nn.Module) -> nn.Module:
    """Parameters that start at zero get a value: else a comparison would not see what they multiply."""
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)
    return model
