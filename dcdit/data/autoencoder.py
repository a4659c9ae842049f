"""Autoencoders of diffusers, from local folders only, and how a model sees their latents."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcdit.utils.weight_files import find_weights, variant_of

WEIGHTS = "diffusion_pytorch_model"
"""How diffusers names files of weights, without what follows."""
SD_VAE_SCALE = 0.18215
"""Scale of Stable Diffusion's latents, for autoencoders whose configuration does not say one."""


def load_autoencoder(path: str | Path, device: torch.device) -> Any:
    """A diffusers ``AutoencoderKL`` in eval mode, float32, without gradients.

    Without plain weights, a variant such as ``fp16`` is read.

    Raises:
        FileNotFoundError: no diffusers configuration there; nothing is ever downloaded.
        ValueError: it does not load.
        ModuleNotFoundError: diffusers is missing.
    """
    if not (Path(path) / "config.json").is_file():
        raise FileNotFoundError(f"no diffusers autoencoder (config.json) in {str(path)!r}; nothing is ever downloaded")
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise ModuleNotFoundError("an autoencoder needs diffusers: pip install 'dcdit[train]'") from None
    try:
        weights = find_weights(Path(path), WEIGHTS)
        variant = None if weights is None else variant_of(weights)
        autoencoder = AutoencoderKL.from_pretrained(
            path, local_files_only=True, variant=variant, torch_dtype=torch.float32
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} holds no readable AutoencoderKL: {' '.join(str(error).split())}") from None
    return autoencoder.to(device).eval().requires_grad_(False)


def shift_and_scale(autoencoder: Any, notes: Mapping[str, str] | None = None) -> tuple[list[float], list[float]]:
    """(shift, scale), each one number or one per channel: a model sees (z - shift) * scale of the autoencoder's z.

    Args:
        notes: of a checkpoint. If they have ``latent_range``, the model was trained with that, and it is returned
            instead of what the autoencoder's configuration says.
    """
    if notes and "latent_range" in notes:
        shift, scale = json.loads(notes["latent_range"])
        return shift, scale
    config = autoencoder.config
    return [config.get("shift_factor") or 0.0], [config.get("scaling_factor") or SD_VAE_SCALE]


def create_decoder(
    path: str | Path | None, in_channels: int, device: torch.device, notes: Mapping[str, str]
) -> Callable[[Tensor], Tensor] | None:
    """A function from samples of a model, (B, in_channels, h, w), to images, (B, 3, H, W) in [-1, 1].

    Args:
        path: of the autoencoder. Without one, samples of 3 channels are taken as pixels; for others there is no
            decoder, and None is returned.
        in_channels: of the model.
        notes: what the model's checkpoint says about itself.

    Raises:
        ValueError: the autoencoder's latents have another number of channels. Other errors as in
            :func:`load_autoencoder`.
    """
    if path is None:
        return (lambda x: x) if in_channels == 3 else None
    autoencoder = load_autoencoder(path, device)
    channels = autoencoder.config.latent_channels
    if channels != in_channels:
        raise ValueError(f"{path} decodes {channels} channels; the model makes {in_channels}")
    shift, scale = (
        torch.tensor(value, device=device).reshape(-1, 1, 1) for value in shift_and_scale(autoencoder, notes)
    )

    @torch.no_grad()
    def decode(x: Tensor) -> Tensor:
        return autoencoder.decode(x.float() / scale + shift).sample

    return decode
