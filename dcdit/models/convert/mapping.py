"""Where other code bases keep the weights: one table per checkpoint layout, read in both directions."""

from collections.abc import Iterator
from typing import NamedTuple


class Place(NamedTuple):
    """Where one tensor of a foreign state dict lives in ours."""

    ours: str
    part: int = 0
    parts: int = 1
    """It is part ``part`` of ``parts`` equal runs of rows; several tensors at one place are copies of each other."""
    unit_dims: int = 0
    """Trailing dimensions of size 1 that only they have (a 1x1 convolution where we have a Linear)."""
    batch_dim: bool = False
    """They have a leading dimension of size 1 (the position table)."""


def official(depth: int) -> dict[str, Place]:
    """DC-DiT's reference implementation (AMD-AGI/DynamicChunkingDiT)."""
    router, inner = "hnet.routing_module", "hnet.main_network.main_network"
    table = {
        **_affine("x_embedder.proj", "x_embedder"),
        **_embedders("t_embedder", "y_embedder"),
        "pos_embed": Place("pos_embed", batch_dim=True),
        **_conv_stack("encoder", widening_block=1),
        **_conv_stack("decoder", widening_block=0),
        **_affine(f"{router}.proj", "router.proj", unit_dims=2),
        **_affine(f"{router}.context_predictor", "router.predictor"),
        **_affine(f"{router}.residual_scorer.0", "router.scorer"),
        **_affine(f"{router}.residual_scorer.1", "router.norm"),
        **_affine(f"{router}.residual_scorer.3", "router.out", unit_dims=2),
        **_affine("hnet.residual_proj", "residual_proj"),
        f"{inner}.rmsnorm.weight": Place("norm.weight"),
        **_final_layer(),
    }
    for block in range(depth):
        table |= _dit_block(f"{inner}.layers.{block}", block, depth)
    return table


def facebook(depth: int) -> dict[str, Place]:
    """facebookresearch/DiT."""
    table = {
        **_affine("x_embedder.proj", "x_embedder"),
        **_embedders("t_embedder", "y_embedder"),
        "pos_embed": Place("pos_embed", batch_dim=True),
        **_final_layer(),
    }
    for block in range(depth):
        table |= _dit_block(f"blocks.{block}", block, depth)
    return table


def diffusers(depth: int) -> dict[str, Place]:
    """``DiTTransformer2DModel`` of diffusers: no position table, and a copy of the embedders in every block."""
    table = {
        **_affine("pos_embed.proj", "x_embedder"),
        **_affine("proj_out_1", "final_layer.modulation"),
        **_affine("proj_out_2", "final_layer.linear"),
    }
    for i in range(depth):
        theirs, ours = f"transformer_blocks.{i}", f"blocks.{i}"
        table |= {
            **_affine(f"{theirs}.norm1.emb.timestep_embedder.linear_1", "t_embedder.fc1"),
            **_affine(f"{theirs}.norm1.emb.timestep_embedder.linear_2", "t_embedder.fc2"),
            f"{theirs}.norm1.emb.class_embedder.embedding_table.weight": Place("y_embedder.table.weight"),
            **_affine(f"{theirs}.norm1.linear", "modulation.linear", i, depth),
            **_affine(f"{theirs}.attn1.to_q", f"{ours}.qkv", 0, 3),
            **_affine(f"{theirs}.attn1.to_k", f"{ours}.qkv", 1, 3),
            **_affine(f"{theirs}.attn1.to_v", f"{ours}.qkv", 2, 3),
            **_affine(f"{theirs}.attn1.to_out.0", f"{ours}.proj"),
            **_affine(f"{theirs}.ff.net.0.proj", f"{ours}.fc1"),
            **_affine(f"{theirs}.ff.net.2", f"{ours}.fc2"),
        }
    return table


def _affine(theirs: str, ours: str, part: int = 0, parts: int = 1, unit_dims: int = 0) -> dict[str, Place]:
    return {
        f"{theirs}.weight": Place(f"{ours}.weight", part, parts, unit_dims),
        f"{theirs}.bias": Place(f"{ours}.bias", part, parts),
    }


def _embedders(time: str, label: str) -> dict[str, Place]:
    return {
        **_affine(f"{time}.mlp.0", "t_embedder.fc1"),
        **_affine(f"{time}.mlp.2", "t_embedder.fc2"),
        f"{label}.embedding_table.weight": Place("y_embedder.table.weight"),
    }


def _final_layer() -> dict[str, Place]:
    return {
        **_affine("final_layer.linear", "final_layer.linear"),
        **_affine("final_layer.adaLN_modulation.1", "final_layer.modulation"),
    }


def _dit_block(theirs: str, block: int, depth: int) -> dict[str, Place]:
    ours = f"blocks.{block}"
    return {
        **_affine(f"{theirs}.attn.qkv", f"{ours}.qkv"),
        **_affine(f"{theirs}.attn.proj", f"{ours}.proj"),
        **_affine(f"{theirs}.mlp.fc1", f"{ours}.fc1"),
        **_affine(f"{theirs}.mlp.fc2", f"{ours}.fc2"),
        **_affine(f"{theirs}.adaLN_modulation.1", "modulation.linear", block, depth),
    }


def _conv_stack(stack: str, widening_block: int) -> dict[str, Place]:
    def entries() -> Iterator[dict[str, Place]]:
        for i in range(2):
            theirs, ours = f"hnet.{stack}.layers.{i}", f"{stack}.blocks.{i}"
            for name in ("norm1", "norm2", "conv1", "conv2"):
                yield _affine(f"{theirs}.{name}", f"{ours}.{name}")
            yield _affine(f"{theirs}.cond_proj.1", f"{ours}.cond_proj")
            if i == widening_block:
                yield _affine(f"{theirs}.skip_proj", f"{ours}.skip", unit_dims=2)

    table = {key: place for entry in entries() for key, place in entry.items()}
    return {**table, f"hnet.{stack}.rmsnorm.weight": Place(f"{stack}.norm.weight")}
