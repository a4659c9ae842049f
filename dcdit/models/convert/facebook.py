"""State dicts of facebookresearch/DiT (arXiv 2212.09748)."""

from typing import Any

import torch
from torch import Tensor

from dcdit.models.config import DiTConfig
from dcdit.models.convert.mapping import (
    KeyTable,
    StateDict,
    WeightSlice,
    export_weights,
    import_weights,
    shapes_of,
    square_grid,
    transformer_fields,
    weight_and_bias,
)
from dcdit.models.dit import DiT

SOURCE = "a DiT state dict of facebookresearch/DiT or diffusers"
SIZING_KEYS = {
    "x_embedder.proj.weight": 4,
    "y_embedder.embedding_table.weight": 2,
    "pos_embed": 3,
    "final_layer.linear.bias": 1,
    "blocks.0.mlp.fc1.weight": 2,
}


def key_table(depth: int) -> KeyTable:
    table = outer_keys()
    for block in range(depth):
        table |= block_keys(f"blocks.{block}", block, depth)
    return table


def outer_keys() -> KeyTable:
    """All that is not a transformer block."""
    return {
        **weight_and_bias("x_embedder.proj", "x_embedder"),
        **weight_and_bias("t_embedder.mlp.0", "t_embedder.fc1"),
        **weight_and_bias("t_embedder.mlp.2", "t_embedder.fc2"),
        "y_embedder.embedding_table.weight": WeightSlice("y_embedder.table.weight"),
        "pos_embed": WeightSlice("pos_embed", leading_ones=1),
        **weight_and_bias("final_layer.linear", "final_layer.linear"),
        **weight_and_bias("final_layer.adaLN_modulation.1", "final_layer.modulation"),
    }


def block_keys(foreign: str, block: int, depth: int) -> KeyTable:
    """Transformer block number ``block`` of ``depth``, whose keys start with ``foreign``."""
    ours = f"blocks.{block}"
    return {
        **weight_and_bias(f"{foreign}.attn.qkv", f"{ours}.qkv"),
        **weight_and_bias(f"{foreign}.attn.proj", f"{ours}.proj"),
        **weight_and_bias(f"{foreign}.mlp.fc1", f"{ours}.fc1"),
        **weight_and_bias(f"{foreign}.mlp.fc2", f"{ours}.fc2"),
        **weight_and_bias(f"{foreign}.adaLN_modulation.1", "modulation.linear", block, depth),
    }


def load_facebook(state_dict: StateDict, num_heads: int, overrides: dict[str, Any]) -> DiT:
    """See :func:`dcdit.models.load_dit`."""
    embed, labels, position, out, fc1 = shapes_of(state_dict, SIZING_KEYS, SOURCE)
    patch = embed[2]
    grid = overrides.get("grid") or tuple(side * patch for side in square_grid(position[1]))
    common = transformer_fields(
        state_dict, "blocks.", num_heads, overrides, embed[1], out[0] // patch**2, labels[0], fc1
    )
    config = DiTConfig.from_dict({**common, "patch_size": patch, "grid": grid})
    with torch.device("meta"):
        model = DiT(config)
    import_weights(model, state_dict, key_table(config.depth), SOURCE)
    return model


def to_facebook(model: DiT) -> dict[str, Tensor]:
    """See :func:`dcdit.models.to_dit`."""
    if model.config.separate_embedders:
        raise ValueError(
            "separate_embedders is True, and facebookresearch/DiT has no such model; accepted: 'diffusers'"
        )
    return export_weights(model, key_table(model.config.depth))
