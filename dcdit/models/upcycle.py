"""Upcycling: the transformer of a pretrained static DiT becomes the inner transformer of a DC-DiT (arXiv 2603.06351).

The blocks with their adaLN are copied, and so are the timestep and class embedders, which stay frozen. The patch
embedding, the final layer and the position table have another shape or another meaning, so they are not copied. The
encoder, the router, the decoder and the final layer of the DC-DiT are initialised as in any other.

A DyDiT (arXiv 2410.03456) has all layers of a static DiT of the same patch size, and gates beside them. It takes all
weights, and nothing is frozen. So does a SparseDiT (arXiv 2412.06028), whose pooled blocks have no queries and no keys.
"""

from typing import Any

import torch
from torch import Tensor

from dcdit.models.config import DCDiTConfig, DiTConfig, DyDiTConfig, ModelConfig, SparseDiTConfig
from dcdit.models.dc_dit import DCDiT
from dcdit.models.dit import DiT
from dcdit.models.dy_dit import DyDiT
from dcdit.models.sparse_dit import SparseDiT
from dcdit.nn import sincos_position

SHARED = (
    "grid",
    "in_channels",
    "hidden_size",
    "depth",
    "num_heads",
    "mlp_ratio",
    "frequency_shift",
    "mlp_norm_eps",
    "separate_embedders",
)
"""Fields that must be equal in a model and in the DiT it is made from. The rows of the label table must be, too."""
WHOLE = ("patch_size", "learn_sigma")
"""Further ones for a DyDiT and a SparseDiT, which take the outer layers as well."""
FROZEN = ("t_embedder", "y_embedder")


def upcycled_fields(source: DiTConfig) -> dict[str, Any]:
    """The fields of :class:`DCDiTConfig` that a DC-DiT made from ``source`` takes over.

    A ``class_dropout_prob`` of 0 is not taken over. It means that there is no null class, and a DC-DiT without a null
    class cannot be guided: the configuration has to ask for such a model.
    """
    values = source.to_dict()
    null_class = ["class_dropout_prob"] if source.class_dropout_prob > 0 else []
    names = (*SHARED, "num_classes", "learn_sigma", *null_class)
    return {**{name: values[name] for name in names}, "adapt_conditioning": True}


def check_source(config: DCDiTConfig | DyDiTConfig | SparseDiTConfig, source: DiTConfig) -> None:
    """Raise a ValueError of one line if a model of ``config`` cannot be made from ``source``."""
    kind = {DCDiTConfig: "DC-DiT", DyDiTConfig: "DyDiT", SparseDiTConfig: "SparseDiT"}[type(config)]
    for name in (*SHARED, *(() if kind == "DC-DiT" else WHOLE)):
        wanted, found = getattr(config, name), getattr(source, name)
        if wanted != found:
            raise ValueError(f"the pretrained DiT has {name} {found}, the {kind} {wanted}; accepted: equal ones")
    rows, wanted = _label_rows(source), _label_rows(config)
    if config.class_dropout_prob > 0 and (source.class_dropout_prob == 0 or rows == config.num_classes):
        raise ValueError(
            f"the pretrained DiT has no null class beside its {rows} labels and the {kind} has class_dropout_prob "
            f"{config.class_dropout_prob}; accepted: 0"
        )
    if rows != wanted:
        raise ValueError(
            f"the pretrained DiT has {rows} rows of labels (null class included), the {kind} {wanted}; accepted: "
            "equal numbers"
        )


def _label_rows(config: ModelConfig) -> int:
    return config.num_classes + (config.class_dropout_prob > 0)


@torch.no_grad()
def upcycle(model: DCDiT | DyDiT | SparseDiT, source: DiT) -> None:
    """Put the weights of ``source`` into ``model``, in place.

    A DyDiT takes all, and keeps its gates. A SparseDiT takes all that its blocks have, and keeps the layers between
    them: it starts as the source without the queries and keys of its pooled blocks, whose middle blocks see few tokens.

    The blocks copied to a DC-DiT know positions in units of the source's patches. So the token of grid cell (r, c) gets
    the sine-cosine position of that cell's centre on the source's patch grid. With patch size 1 that is the usual
    table. The table is stored with the weights, so the checkpoint is like any other.

    Args:
        model: a new one.
        source: of any dtype, on any device.

    Raises:
        ValueError: the two do not fit, see :func:`check_source`.
    """
    check_source(model.config, source.config)
    if not isinstance(model, DCDiT):
        weights = source.state_dict()
        if isinstance(model, SparseDiT):
            weights = _split_inputs(weights, model.config)
        model.load_state_dict({**model.state_dict(), **weights})
        return
    # Packed and dense blocks have the same weights.
    for name in ("blocks", "modulation", *FROZEN):
        model.get_submodule(name).load_state_dict(source.get_submodule(name).state_dict())
    position = sincos_position(model.config.hidden_size, model.config.grid, source.config.patch_size)
    model.get_buffer("pos_embed").copy_(position)


def _split_inputs(weights: dict[str, Tensor], config: SparseDiTConfig) -> dict[str, Tensor]:
    """The weights of a static DiT under the names that the layers in front of attention have in a SparseDiT."""
    split, dim = dict(weights), config.hidden_size
    for index, kind in enumerate(config.kinds):
        if kind in ("sparse", "dense"):
            continue
        for part in ("weight", "bias"):
            qkv = split.pop(f"blocks.{index}.qkv.{part}")
            if kind == "pooled":
                split[f"blocks.{index}.value.{part}"] = qkv[2 * dim :]
            else:
                split[f"blocks.{index}.query.{part}"] = qkv[:dim]
                split[f"blocks.{index}.key_value.{part}"] = qkv[dim:]
    return split


def freeze_embedders(model: DCDiT) -> None:
    """Keep the timestep and class embedders as they are from now on."""
    for name in FROZEN:
        model.get_submodule(name).requires_grad_(False)
