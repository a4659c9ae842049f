"""The published model sizes by name."""

from collections.abc import Mapping
from typing import Any

from dcdit.models.config import DCDiTConfig, DiTConfig, DyDiTConfig, ModelConfig, SparseDiTConfig
from dcdit.models.dc_dit import DCDiT
from dcdit.models.dit import DiT
from dcdit.models.dy_dit import DyDiT
from dcdit.models.sparse_dit import SparseDiT
from dcdit.utils.schema import did_you_mean

LATENT_STRIDE = 8

SCALES = {
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}
PATCH_SIZES = (1, 2, 4, 8)
MODULES = {
    "S": {"modules": 2, "sparse_depth": 2},
    "B": {"modules": 2, "sparse_depth": 2},
    "L": {"modules": 4, "sparse_depth": 2},
    "XL": {"modules": 4, "sparse_depth": 3},
}
"""Of a SparseDiT, which begins with one pooled block, or with two where an image has more than 16 x 16 patches. XL is
as published."""
SPARSE_SIDE = 8
"""Sparse tokens per side of a SparseDiT, or half of the patches if those are fewer than 16."""

PRESETS = (
    *(f"DC-DiT-{scale}" for scale in SCALES),
    *(f"DiT-{scale}/{patch}" for scale in SCALES for patch in PATCH_SIZES),
    *(f"DyDiT-{scale}/{patch}" for scale in SCALES for patch in PATCH_SIZES),
    *(f"SparseDiT-{scale}/{patch}" for scale in SCALES for patch in PATCH_SIZES),
)
"""The names that :func:`create_model` takes."""
PRESET_FORMS = (
    "DC-DiT-SCALE, DiT-SCALE/PATCH, DyDiT-SCALE/PATCH and SparseDiT-SCALE/PATCH, "
    f"with a scale of {', '.join(SCALES)} and a patch size of {', '.join(map(str, PATCH_SIZES))}"
)
"""The same, short enough to read."""


def check_preset(name: str, overrides: Mapping[str, Any]) -> None:
    """Raise ValueError for an unknown preset, or an override that it never accepts, whatever the sizes are."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; accepted: {PRESET_FORMS}{did_you_mean(name, PRESETS)}")
    config_class(name).check_fields(overrides)


def config_class(name: str) -> type[ModelConfig]:
    """The class of a preset's configuration."""
    kind = name.partition("-")[0]
    return {"DC": DCDiTConfig, "DiT": DiTConfig, "DyDiT": DyDiTConfig, "SparseDiT": SparseDiTConfig}[kind]


def create_config(
    name: str, image_size: int | tuple[int, int] = 256, num_classes: int = 1000, **overrides: Any
) -> ModelConfig:
    """The configuration of a preset; see :func:`create_model`.

    Example:
        >>> from dcdit.models import create_config
        >>> config = create_config("DC-DiT-B", image_size=512, num_classes=10)
        >>> config.grid, config.hidden_size, config.depth, config.dechunk_sigma
        ((64, 64), 768, 12, 2.0)
    """
    check_preset(name, overrides)
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2 or any(side < LATENT_STRIDE or side % LATENT_STRIDE for side in sides):
        raise ValueError(
            f"image_size is {image_size}; accepted: a multiple of {LATENT_STRIDE}, or (height, width) of such"
        )
    common = {"grid": (sides[0] // LATENT_STRIDE, sides[1] // LATENT_STRIDE), "num_classes": num_classes}
    if name.startswith("DC-DiT-"):
        sigma = 2.0 if max(sides) >= 512 else 1.0
        scale = SCALES[name.removeprefix("DC-DiT-")]
        return DCDiTConfig.from_dict({**common, **scale, "dechunk_sigma": sigma, **overrides})
    scale_name, patch = name.partition("-")[2].split("/")
    fields = {**common, **SCALES[scale_name], "patch_size": int(patch), **overrides}
    if name.startswith("SparseDiT-"):
        patches = [side // int(patch) for side in fields["grid"]]
        sparse = [min(SPARSE_SIDE, max(1, side // 2)) for side in patches]
        fields = {"pooled": 2 if max(patches) > 16 else 1, **MODULES[scale_name], "sparse_grid": sparse, **fields}
    return config_class(name).from_dict(fields)


def create_model(
    name: str, image_size: int | tuple[int, int] = 256, num_classes: int = 1000, **overrides: Any
) -> DCDiT | DiT | DyDiT | SparseDiT:
    """A model of a published size for the latents of an autoencoder with stride 8 and 4 channels.

    Args:
        name: ``DC-DiT-S|B|L|XL``, or with a patch size of 1, 2, 4 or 8 behind it (``DiT-S/2``) the static baseline
            ``DiT-S|B|L|XL``, a ``DyDiT-S|B|L|XL``, or a ``SparseDiT-S|B|L|XL``.
        image_size: in pixels, one side or (height, width). The grid has an eighth of them. The de-chunk's sigma is 2
            from 512 pixels on, and 1 below.
        num_classes: real classes, without the null class.
        **overrides: any other field of :class:`DCDiTConfig`, :class:`DiTConfig`, :class:`DyDiTConfig` or
            :class:`SparseDiTConfig`, e.g. ``in_channels``; ``router="cosine2d"`` makes the DC-DiT of the paper's first
            version, and ``dynamic_width=True`` a DC-DiT whose width follows the timestep.

    Raises:
        ValueError: unknown name, or a value that is not accepted.

    Example:
        >>> from dcdit.models import create_model
        >>> sum(parameter.numel() for parameter in create_model("DC-DiT-S").parameters())  # without the position table
        34367241
        >>> type(create_model("DiT-S/8")).__name__, type(create_model("DyDiT-S/8")).__name__
        ('DiT', 'DyDiT')
    """
    config = create_config(name, image_size, num_classes, **overrides)
    if isinstance(config, DCDiTConfig):
        return DCDiT(config)
    if isinstance(config, SparseDiTConfig):
        return SparseDiT(config)
    return DyDiT(config) if isinstance(config, DyDiTConfig) else DiT(config)
