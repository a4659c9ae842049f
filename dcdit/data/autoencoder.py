"""Autoencoders of diffusers, from local folders only, and the range of their latents."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SD_VAE_SCALE = 0.18215
"""Scaling of Stable Diffusion's latents, for autoencoders whose configuration does not say."""


def load_autoencoder(path: str | Path, device: torch.device) -> Any:
    """A diffusers ``AutoencoderKL`` in eval mode, without gradients.

    Raises:
        FileNotFoundError: no diffusers configuration there; nothing is ever downloaded.
        ValueError: it does not load. ModuleNotFoundError: diffusers is missing.
    """
    if not (Path(path) / "config.json").is_file():
        raise FileNotFoundError(f"no diffusers autoencoder (config.json) in {str(path)!r}; nothing is ever downloaded")
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise ModuleNotFoundError("an autoencoder needs diffusers: pip install 'dcdit[train]'") from None
    try:
        autoencoder = AutoencoderKL.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} holds no readable AutoencoderKL: {' '.join(str(error).split())}") from None
    return autoencoder.to(device).eval().requires_grad_(False)


def latent_range(autoencoder: Any, notes: Mapping[str, str] | None = None) -> tuple[list[float], list[float]]:
    """(shift, scale), each of one number or one per channel: a model sees (z - shift) * scale of the autoencoder's z.

    Args:
        notes: of a checkpoint; ``latent_range`` in them is what the model was trained with and goes before what the
            autoencoder's configuration says.
    """
    config = autoencoder.config
    own = [config.get("shift_factor") or 0.0], [config.get("scaling_factor") or SD_VAE_SCALE]
    shift, scale = json.loads(notes["latent_range"]) if notes and "latent_range" in notes else own
    return shift, scale


def create_decoder(
    path: str | Path | None, in_channels: int, device: torch.device, notes: Mapping[str, str]
) -> Callable[[Tensor], Tensor] | None:
    """From samples of a model to (B, 3, H, W) in [-1, 1]; None where they are latents and nothing decodes them.

    Args:
        path: of the autoencoder; without one, samples of 3 channels are taken as pixels.
        in_channels: of the model.
        notes: what the model's checkpoint says about itself.

    Raises:
        ValueError: the autoencoder's latents have another number of channels. Others as in :func:`load_autoencoder`.
    """
    if path is None:
        return (lambda x: x) if in_channels == 3 else None
    autoencoder = load_autoencoder(path, device)
    channels = autoencoder.config.latent_channels
    if channels != in_channels:
        raise ValueError(f"{path} decodes {channels} channels; the model makes {in_channels}")
    shift, scale = (torch.tensor(end, device=device).reshape(-1, 1, 1) for end in latent_range(autoencoder, notes))

    @torch.no_grad()
    def decode(x: Tensor) -> Tensor:
        return autoencoder.decode(x.float() / scale + shift).sample

    return decode
