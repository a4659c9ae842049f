"""State dicts of the DC-DiT reference implementation (github AMD-AGI/DynamicChunkingDiT)."""

from typing import Any

import torch
from torch import Tensor

from dcdit.models.config import DCDiTConfig
from dcdit.models.convert.facebook import block_keys, outer_keys
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
from dcdit.models.dc_dit import DCDiT

SOURCE = "a DC-DiT state dict of the reference implementation"
ROUTER = "hnet.routing_module"
TRANSFORMER = "hnet.main_network.main_network"
SIZING_KEYS = {
    "x_embedder.proj.weight": 4,
    "y_embedder.embedding_table.weight": 2,
    "pos_embed": 3,
    "final_layer.linear.bias": 1,
    f"{TRANSFORMER}.layers.0.mlp.fc1.weight": 2,
    f"{ROUTER}.residual_scorer.3.bias": 1,
}


def key_table(depth: int) -> KeyTable:
    """The reference implementation grew out of facebookresearch/DiT and kept its names around and in the blocks."""
    table = {
        **outer_keys(),
        **_conv_stack_keys("encoder", widening_block=1),
        **_conv_stack_keys("decoder", widening_block=0),
        **weight_and_bias(f"{ROUTER}.proj", "router.proj", trailing_ones=2),
        **weight_and_bias(f"{ROUTER}.context_predictor", "router.predictor"),
        **weight_and_bias(f"{ROUTER}.residual_scorer.0", "router.scorer"),
        **weight_and_bias(f"{ROUTER}.residual_scorer.1", "router.norm"),
        **weight_and_bias(f"{ROUTER}.residual_scorer.3", "router.out", trailing_ones=2),
        **weight_and_bias("hnet.residual_proj", "residual_proj"),
        f"{TRANSFORMER}.rmsnorm.weight": WeightSlice("norm.weight"),
    }
    for block in range(depth):
        table |= block_keys(f"{TRANSFORMER}.layers.{block}", block, depth)
    return table


def _conv_stack_keys(stack: str, widening_block: int) -> KeyTable:
    table = {f"hnet.{stack}.rmsnorm.weight": WeightSlice(f"{stack}.norm.weight")}
    for block in range(2):
        theirs, ours = f"hnet.{stack}.layers.{block}", f"{stack}.blocks.{block}"
        for name in ("norm1", "norm2", "conv1", "conv2"):
            table |= weight_and_bias(f"{theirs}.{name}", f"{ours}.{name}")
        table |= weight_and_bias(f"{theirs}.cond_proj.1", f"{ours}.cond_proj")
        if block == widening_block:
            table |= weight_and_bias(f"{theirs}.skip_proj", f"{ours}.skip", trailing_ones=2)
    return table


def load_official(state_dict: StateDict, num_heads: int, dechunk_sigma: float = 1.0, **overrides: Any) -> DCDiT:
    """A model from a state dict of the DC-DiT reference implementation (github AMD-AGI/DynamicChunkingDiT).

    Sizes come from the shapes. The grid is taken to be square, and the last row of the label table to be the null
    class. Every tensor keeps its dtype.

    Args:
        state_dict: its ``model.state_dict()``, e.g. the entry ``"ema"`` or ``"model"`` of a checkpoint.
        num_heads: of the attention; the weights do not tell.
        dechunk_sigma: of the smoothing; the weights do not tell. 1 at 256 px, 2 at 512 px.
        **overrides: other fields of :class:`DCDiTConfig` that the weights do not tell (``grid``,
            ``class_dropout_prob``).

    Raises:
        ValueError: keys or shapes of another architecture.

    Example:
        >>> import torch
        >>> from dcdit.models import create_model, load_official, to_official
        >>> model = create_model("DC-DiT-S", grid=(4, 4), hidden_size=128, depth=1, num_heads=2, num_classes=10)
        >>> same = load_official(to_official(model), num_heads=2)  # or the entry "ema" of a checkpoint
        >>> same.config == model.config
        True
        >>> weights = same.state_dict()
        >>> all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
        True
    """
    embed, labels, position, out, fc1, _ = shapes_of(state_dict, SIZING_KEYS, SOURCE)
    common = transformer_fields(
        state_dict, f"{TRANSFORMER}.layers.", num_heads, overrides, embed[1], out[0], labels[0], fc1
    )
    grid = overrides.get("grid") or square_grid(position[1])
    config = DCDiTConfig.from_dict({**common, "dechunk_sigma": dechunk_sigma, "grid": grid})
    with torch.device("meta"):
        model = DCDiT(config)
    import_weights(model, state_dict, key_table(config.depth), SOURCE)
    model.objective = "dit"  # the only one of the reference implementation
    return model


def to_official(model: DCDiT) -> dict[str, Tensor]:
    """The inverse of :func:`load_official`: copies of the weights under the reference implementation's names.

    Raises:
        ValueError: a router, a de-chunk, an adaptor or gates that the reference implementation does not have.

    Example:
        >>> from dcdit.models import create_model, to_official
        >>> model = create_model("DC-DiT-S", grid=(4, 4), hidden_size=128, depth=1, num_heads=2, num_classes=10)
        >>> sorted(name for name in to_official(model) if "router" in name or "routing" in name)[:2]
        ['hnet.routing_module.context_predictor.bias', 'hnet.routing_module.context_predictor.weight']
    """
    config = model.config
    if (config.router, config.dechunk) != ("predictability", "spatial"):
        raise ValueError(
            f"router is {config.router!r} and dechunk {config.dechunk!r}; accepted: 'predictability' and 'spatial', "
            "the only ones of the reference implementation"
        )
    if config.adapt_conditioning:
        raise ValueError("adapt_conditioning is True; accepted: False, the reference implementation has no adaptor")
    if config.cell_context:
        raise ValueError("cell_context is True; accepted: False, the reference implementation has no such layer")
    if config.dynamic_width:
        raise ValueError("dynamic_width is True; accepted: False, the reference implementation has no gates")
    if config.separate_embedders or config.frequency_shift or config.mlp_norm_eps != DCDiTConfig.mlp_norm_eps:
        raise ValueError("the model is upcycled from a DiT of diffusers, and the reference implementation has no such")
    return export_weights(model, key_table(config.depth))
