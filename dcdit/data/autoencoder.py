"""Autoencoders of diffusers, from local folders only, and how a model sees their latents."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcdit.utils.inside import listed_files
from dcdit.utils.reading import read_json
from dcdit.utils.schema import is_size
from dcdit.utils.tensors import open_tensors
from dcdit.utils.text import one_line, short
from dcdit.utils.weight_files import find_weights, variant_of

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model"
"""Names of diffusers."""
AUTOENCODER = "AutoencoderKL"
LARGEST = {
    "in_channels": 64,
    "out_channels": 64,
    "latent_channels": 1024,
    "layers_per_block": 16,
    "norm_num_groups": 1024,
}
MAX_BLOCKS, MAX_CHANNELS = 8, 8192
"""Far above every published autoencoder: the configuration alone decides how much memory is taken."""
SD_VAE_SCALE = 0.18215
"""Scale of Stable Diffusion's latents, for autoencoders whose configuration does not say one."""


def load_autoencoder(path: str | Path, device: torch.device) -> Any:
    """A diffusers ``AutoencoderKL`` in eval mode, float32, without gradients.

    Without plain weights, a variant such as ``fp16`` is read.

    Raises:
        FileNotFoundError: no diffusers configuration there, or no weights in safetensors; nothing is ever downloaded.
        ValueError: a folder of another kind, or it does not load.
        ModuleNotFoundError: diffusers is missing.
    """
    _check_folder(Path(path))
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise ModuleNotFoundError("an autoencoder needs diffusers: pip install 'dcdit[train]'") from None
    try:
        weights = find_weights(Path(path), WEIGHTS)
        autoencoder = AutoencoderKL.from_pretrained(
            path,
            local_files_only=True,
            use_safetensors=True,
            variant=None if weights is None else variant_of(weights),
            torch_dtype=torch.float32,
        )
    except Exception as error:  # a configuration that makes no sense raises anything in diffusers
        raise ValueError(f"{path} holds no readable AutoencoderKL: {one_line(error)}") from None
    return autoencoder.to(device).eval().requires_grad_(False)


def _check_folder(path: Path) -> None:
    """Refuse a folder of another kind, with the folder that may be meant, and sizes that no autoencoder has."""
    meant = next((f for f in (path / "vae", path.parent / "vae") if f != path and (f / CONFIG).is_file()), None)
    if (path / "model_index.json").exists():
        raise ValueError(f"{path} is a whole pipeline; accepted: its autoencoder, {path / 'vae'}")
    if not (path / CONFIG).exists():
        found = "" if meant is None else f"; there is one in {str(meant)!r}"
        raise FileNotFoundError(
            f"no diffusers autoencoder ({CONFIG}) in {str(path)!r}; nothing is ever downloaded{found}"
        )
    config = read_json(path / CONFIG)
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind != AUTOENCODER:
        beside = "" if meant is None else f", such as {meant}"
        raise ValueError(f"{path / CONFIG} is of a {short(kind)}; accepted: the folder of an {AUTOENCODER}{beside}")
    for name, largest in LARGEST.items():
        if name in config and not is_size(config[name], largest):
            raise ValueError(f"{path / CONFIG} has the {name} {config[name]!r}; accepted: 1 to {largest}")
    blocks = config.get("block_out_channels", [64])
    if (
        not isinstance(blocks, list)
        or not 1 <= len(blocks) <= MAX_BLOCKS
        or not all(is_size(b, MAX_CHANNELS) for b in blocks)
    ):
        raise ValueError(
            f"{path / CONFIG} has the block_out_channels {blocks!r}; accepted: at most {MAX_BLOCKS} integers from 1 to "
            f"{MAX_CHANNELS}"
        )
    for name in ("scaling_factor", "shift_factor"):
        if config.get(name) is not None and not _is_number(config[name]):
            raise ValueError(f"{path / CONFIG} has the {name} {config[name]!r}; accepted: a finite number")
    files = sorted(path.glob(f"{WEIGHTS}*"))
    if not any(file.suffix == ".safetensors" for file in files):
        instead = f", not {files[0].name}, which may run code (save_pretrained converts it)" if files else ""
        raise FileNotFoundError(f"no {WEIGHTS}.safetensors in {str(path)!r}; accepted: safetensors{instead}")
    for index in path.glob(f"{WEIGHTS}*.index.json"):
        listed_files(index)
    widths = {width for file in files if file.suffix == ".safetensors" for width in _widths(file)}
    if not widths.issuperset(blocks):
        raise ValueError(f"{path / CONFIG} has the block_out_channels {blocks}, which the weights do not have")


def _widths(file: Path) -> set[int]:
    """The first sizes of all tensors in a file, without reading their numbers."""
    with open_tensors(file) as tensors:
        shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118 (not a mapping)
    return {shape[0] for shape in shapes if shape}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def shift_and_scale(
    autoencoder: Any, notes: Mapping[str, str] | None = None, source: str | Path = "the checkpoint"
) -> tuple[list[float], list[float]]:
    """(shift, scale), each one number or one per channel: a model sees (z - shift) * scale of the autoencoder's z.

    Args:
        notes: of a checkpoint. If they have ``latent_range``, the model was trained with that, and it is returned
            instead of what the autoencoder's configuration says.
        source: of the notes, for the message of the ValueError that they may cause.
    """
    if notes and "latent_range" in notes:
        return _latent_range(notes["latent_range"], autoencoder.config.latent_channels, source)
    config = autoencoder.config
    return [config.get("shift_factor") or 0.0], [config.get("scaling_factor") or SD_VAE_SCALE]


def _latent_range(text: str, channels: int, source: str | Path) -> tuple[list[float], list[float]]:
    try:
        shift, scale = json.loads(text)
        for values in (shift, scale):
            if len(values) not in (1, channels) or not all(map(_is_number, values)):
                raise ValueError
    except (ValueError, TypeError, RecursionError):
        raise ValueError(
            f"{source} notes the latent_range {short(text)}; accepted: a list of shifts and one of scales, each of 1 "
            f"or {channels} numbers"
        ) from None
    return shift, scale


def create_decoder(
    path: str | Path | None,
    in_channels: int,
    device: torch.device,
    notes: Mapping[str, str],
    source: str | Path = "the checkpoint",
) -> Callable[[Tensor], Tensor] | None:
    """A function from samples of a model, (B, in_channels, h, w), to images, (B, 3, H, W) in [-1, 1].

    Args:
        path: of the autoencoder. Without one, samples of 3 channels are taken as pixels; for others there is no
            decoder, and None is returned.
        in_channels: of the model.
        notes: what the model's checkpoint says about itself.
        source: that checkpoint, for messages.

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
        torch.tensor(value, device=device).reshape(-1, 1, 1) for value in shift_and_scale(autoencoder, notes, source)
    )

    @torch.no_grad()
    def decode(x: Tensor) -> Tensor:
        return autoencoder.decode(x.float() / scale + shift).sample

    return decode
