"""State dicts of diffusers' ``DiTTransformer2DModel``: no position table, and the embedders once in every block.

The blocks of a DiT that diffusers trained have embedders of their own, which differ. In one that was converted from the
original they are copies, of which we keep one."""

import re
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
    transformer_fields,
    weight_and_bias,
)
from dcdit.models.dit import DiT
from dcdit.nn import sincos_position

SOURCE = "a DiTTransformer2DModel state dict of diffusers"
PATCH_EMBED = "pos_embed.proj.weight"
TIMESTEPS, LABELS = "norm1.emb.timestep_embedder", "norm1.emb.class_embedder.embedding_table.weight"
"""In a block."""
CONVENTIONS = {"frequency_shift": 1, "mlp_norm_eps": 1e-5}
"""Of diffusers, where they differ from the original's."""
SIZING_KEYS = {
    PATCH_EMBED: 4,
    f"transformer_blocks.0.{LABELS}": 2,
    "proj_out_2.bias": 1,
    "transformer_blocks.0.ff.net.0.proj.weight": 2,
}


def key_table(depth: int, separate_embedders: bool) -> KeyTable:
    table = {
        **weight_and_bias("pos_embed.proj", "x_embedder"),
        **weight_and_bias("proj_out_1", "final_layer.modulation"),
        **weight_and_bias("proj_out_2", "final_layer.linear"),
    }
    for block in range(depth):
        theirs, ours = f"transformer_blocks.{block}", f"blocks.{block}"
        t_embedder = f"t_embedder.{block}" if separate_embedders else "t_embedder"
        labels = (block, depth) if separate_embedders else (0, 1)
        modulation = (f"modulation.linears.{block}",) if separate_embedders else ("modulation.linear", block, depth)
        table |= {
            **weight_and_bias(f"{theirs}.{TIMESTEPS}.linear_1", f"{t_embedder}.fc1"),
            **weight_and_bias(f"{theirs}.{TIMESTEPS}.linear_2", f"{t_embedder}.fc2"),
            f"{theirs}.{LABELS}": WeightSlice("y_embedder.table.weight", *labels),
            **weight_and_bias(f"{theirs}.norm1.linear", *modulation),
            **weight_and_bias(f"{theirs}.attn1.to_q", f"{ours}.qkv", 0, 3),
            **weight_and_bias(f"{theirs}.attn1.to_k", f"{ours}.qkv", 1, 3),
            **weight_and_bias(f"{theirs}.attn1.to_v", f"{ours}.qkv", 2, 3),
            **weight_and_bias(f"{theirs}.attn1.to_out.0", f"{ours}.proj"),
            **weight_and_bias(f"{theirs}.ff.net.0.proj", f"{ours}.fc1"),
            **weight_and_bias(f"{theirs}.ff.net.2", f"{ours}.fc2"),
        }
    return table


def is_diffusers(state_dict: StateDict) -> bool:
    return PATCH_EMBED in state_dict


def embedders_differ(state_dict: StateDict) -> bool:
    """Whether the blocks have embedders of their own: diffusers trained them."""
    for key, value in state_dict.items():
        first = re.sub(r"^transformer_blocks\.\d+\.", "transformer_blocks.0.", key)
        if ".norm1.emb." in key and first in state_dict and not _equal(value, state_dict[first]):
            return True
    return False


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def load_diffusers(state_dict: StateDict, num_heads: int, overrides: dict[str, Any]) -> DiT:
    """See :func:`dcdit.models.load_dit`."""
    embed, labels, out, fc1 = shapes_of(state_dict, SIZING_KEYS, SOURCE)
    if "grid" not in overrides:
        raise ValueError("diffusers stores no position table; accepted: grid=(sample_size, sample_size)")
    patch, separate = embed[2], embedders_differ(state_dict)
    common = transformer_fields(
        state_dict, "transformer_blocks.", num_heads, overrides, embed[1], out[0] // patch**2, labels[0], fc1
    )
    config = DiTConfig.from_dict({**CONVENTIONS, "separate_embedders": separate, **common, "patch_size": patch})
    with torch.device("meta"):
        model = DiT(config)
    position = sincos_position(config.hidden_size, model.patch_grid).to(state_dict[PATCH_EMBED].device)
    import_weights(model, state_dict, key_table(config.depth, separate), SOURCE, pos_embed=position)
    return model


def to_diffusers(model: DiT) -> dict[str, Tensor]:
    """See :func:`dcdit.models.to_dit`."""
    return export_weights(model, key_table(model.config.depth, model.config.separate_embedders))
