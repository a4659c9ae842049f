"""Checkpoints of other code bases, read and written without loss."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dcdit.models.config import DCDiTConfig, DiTConfig
from dcdit.models.convert import mapping as layouts
from dcdit.models.convert.mapping import Place
from dcdit.models.dc_dit import DCDiT
from dcdit.models.dit import DiT
from dcdit.nn import sincos_position
from dcdit.nn.memory_format import channels_last

State = Mapping[str, Tensor]

OFFICIAL_BLOCK = "hnet.main_network.main_network.layers"
TRUNK = ("x_embedder.proj.weight", "y_embedder.embedding_table.weight", "pos_embed", "final_layer.linear.bias")


def load_official(state_dict: State, num_heads: int, dechunk_sigma: float = 1.0, **overrides: Any) -> DCDiT:
    """A model from a state dict of the DC-DiT reference implementation (github AMD-AGI/DynamicChunkingDiT).

    Sizes come from the shapes; the grid is taken to be square, and the last row of the label table to be the null
    class. Every tensor keeps its dtype.

    Args:
        state_dict: its ``model.state_dict()``, e.g. the entry ``"ema"`` or ``"model"`` of a checkpoint.
        num_heads: of the attention; the weights do not tell.
        dechunk_sigma: of the smoothing; the weights do not tell. 1 at 256 px, 2 at 512 px.
        **overrides: other fields of :class:`DCDiTConfig` that the weights do not tell (``grid``,
            ``class_dropout_prob``).

    Raises:
        ValueError: keys or shapes of another architecture.
    """
    what = "a DC-DiT state dict of the reference implementation"
    block = f"{OFFICIAL_BLOCK}.0"
    embed, labels, position, out, fc1, _ = _shapes(
        state_dict, (*TRUNK, f"{block}.mlp.fc1.weight", "hnet.routing_module.residual_scorer.3.bias"), what
    )
    config = DCDiTConfig.from_dict(
        {
            **_common(state_dict, f"{OFFICIAL_BLOCK}.", num_heads, overrides, embed[1], out[0], labels[0], fc1),
            "dechunk_sigma": dechunk_sigma,
            "grid": overrides.get("grid") or _square(position[1]),
        }
    )
    with torch.device("meta"):
        model = DCDiT(config)
    _fill(model, state_dict, layouts.official(config.depth), what)
    return channels_last(model)


def to_official(model: DCDiT) -> dict[str, Tensor]:
    """The inverse of :func:`load_official`: copies of the weights under the reference implementation's names.

    Raises:
        ValueError: a router, a de-chunk or an adaptor that the reference implementation does not have.
    """
    config = model.config
    if (config.router, config.dechunk) != ("predictability", "spatial"):
        raise ValueError(
            f"router is {config.router!r} and dechunk {config.dechunk!r}; accepted: 'predictability' and 'spatial', "
            "the only ones of the reference implementation"
        )
    if config.adapt_conditioning:
        raise ValueError("adapt_conditioning is True; accepted: False, the reference implementation has no adaptor")
    return _extract(model, layouts.official(config.depth))


def load_dit(state_dict: State, num_heads: int, **overrides: Any) -> DiT:
    """A static DiT from a state dict of facebookresearch/DiT or of diffusers' ``DiTTransformer2DModel``.

    The two differ by more than names: diffusers spaces the timestep frequencies by 1/127 instead of 1/128 and uses eps
    1e-5 before the MLP. Each layout gets its own convention, so that outputs equal those of the code base it comes
    from; weights that the original trained and diffusers merely stores want ``frequency_shift=0, mlp_norm_eps=1e-6``.

    Args:
        state_dict: either layout; it is recognised by its keys. Every tensor keeps its dtype.
        num_heads: of the attention; the weights do not tell.
        **overrides: other fields of :class:`DiTConfig` that the weights do not tell. diffusers stores no position
            table: its layout needs ``grid`` (there ``(sample_size, sample_size)``).

    Raises:
        ValueError: keys or shapes of another architecture, embedders that differ between the blocks (diffusers keeps a
            copy in each), or a missing grid.
    """
    if "pos_embed.proj.weight" in state_dict:
        return _load_diffusers(state_dict, num_heads, overrides)
    what = "a DiT state dict of facebookresearch/DiT or diffusers"
    embed, labels, position, out, fc1 = _shapes(state_dict, (*TRUNK, "blocks.0.mlp.fc1.weight"), what)
    patch = embed[2]
    grid = overrides.get("grid") or tuple(side * patch for side in _square(position[1]))
    common = _common(state_dict, "blocks.", num_heads, overrides, embed[1], out[0] // patch**2, labels[0], fc1)
    config = DiTConfig.from_dict({**common, "patch_size": patch, "grid": grid})
    with torch.device("meta"):
        model = DiT(config)
    _fill(model, state_dict, layouts.facebook(config.depth), what)
    return model


def _load_diffusers(state_dict: State, num_heads: int, overrides: dict[str, Any]) -> DiT:
    what = "a DiTTransformer2DModel state dict of diffusers"
    block = "transformer_blocks.0"
    wanted = ("pos_embed.proj.weight", f"{block}.norm1.emb.class_embedder.embedding_table.weight", "proj_out_2.bias")
    embed, labels, out, fc1 = _shapes(state_dict, (*wanted, f"{block}.ff.net.0.proj.weight"), what)
    if "grid" not in overrides:
        raise ValueError("diffusers stores no position table; accepted: grid=(sample_size, sample_size)")
    patch = embed[2]
    common = _common(
        state_dict, "transformer_blocks.", num_heads, overrides, embed[1], out[0] // patch**2, labels[0], fc1
    )
    config = DiTConfig.from_dict({"frequency_shift": 1, "mlp_norm_eps": 1e-5, **common, "patch_size": patch})
    with torch.device("meta"):
        model = DiT(config)
    position = sincos_position(config.hidden_size, model.patch_grid).to(state_dict["pos_embed.proj.weight"].device)
    _fill(model, state_dict, layouts.diffusers(config.depth), what, pos_embed=position)
    return model


def to_dit(model: DiT, layout: str = "facebook") -> dict[str, Tensor]:
    """The inverse of :func:`load_dit`: copies of the weights in one of the two layouts.

    Args:
        layout: ``"facebook"`` or ``"diffusers"``, which drops the position table and repeats the embedders in every
            block.

    Raises:
        ValueError: unknown layout.
    """
    tables = {"facebook": layouts.facebook, "diffusers": layouts.diffusers}
    if layout not in tables:
        raise ValueError(f"unknown layout {layout!r}; accepted: {', '.join(tables)}")
    return _extract(model, tables[layout](model.config.depth))


# --- sizes from shapes --------------------------------------------------------------------------------------------


def _shapes(state_dict: State, keys: tuple[str, ...], what: str) -> list[torch.Size]:
    missing = [key for key in keys if not isinstance(state_dict.get(key), Tensor)]
    if missing:
        found = ", ".join(list(state_dict)[:3]) or "nothing"
        raise ValueError(
            f"not {what}: {missing[0]} is missing, found {found}, ...; accepted: the keys of its model.state_dict()"
        )
    return [state_dict[key].shape for key in keys]


def _common(
    state_dict: State,
    blocks: str,
    num_heads: int,
    overrides: dict[str, Any],
    in_channels: int,
    out_channels: int,
    label_rows: int,
    fc1: torch.Size,
) -> dict[str, Any]:
    if out_channels not in (in_channels, 2 * in_channels):
        raise ValueError(
            f"the final layer predicts {out_channels} channels; accepted: {in_channels} or {2 * in_channels}"
        )
    numbers = {int(found[1]) for key in state_dict if (found := re.match(re.escape(blocks) + r"(\d+)\.", key))}
    dropped = overrides.get("class_dropout_prob", DCDiTConfig.class_dropout_prob) > 0
    return {
        "in_channels": in_channels,
        "hidden_size": fc1[1],
        "depth": len(numbers),
        "num_heads": num_heads,
        "mlp_ratio": fc1[0] / fc1[1],
        "num_classes": label_rows - dropped,
        "learn_sigma": out_channels == 2 * in_channels,
        **overrides,
    }


def _square(length: int) -> tuple[int, int]:
    side = math.isqrt(length)
    if side * side != length:
        raise ValueError(
            f"pos_embed has {length} positions, which is no square; accepted: grid=(H, W) with that product"
        )
    return side, side


# --- moving tensors -----------------------------------------------------------------------------------------------


def _fill(model: nn.Module, state_dict: State, table: dict[str, Place], what: str, **extra: Tensor) -> None:
    """Put every foreign tensor in its place of a model on the meta device, refusing anything that does not fit."""
    ours = model.state_dict()
    _check_keys(state_dict, table, what)
    parts: dict[str, dict[int, tuple[str, Tensor]]] = defaultdict(dict)
    for key, place in table.items():
        value, expected = state_dict[key], _their_shape(ours[place.ours], place)
        if value.shape != expected:
            raise ValueError(f"{key} has shape {tuple(value.shape)}; accepted: {tuple(expected)}")
        first_key, first = parts[place.ours].setdefault(place.part, (key, value))
        if first is not value and (first.dtype != value.dtype or not torch.equal(first, value)):
            raise ValueError(f"{key} differs from {first_key}; accepted: equal copies, for we keep one")
    state: dict[str, Tensor] = dict(extra)
    for name, found in parts.items():
        rows = [found[part][1].detach() for part in sorted(found)]
        if len({row.dtype for row in rows}) > 1:
            raise ValueError(
                f"{found[0][0]} and its siblings have several dtypes; accepted: one, for they become {name}"
            )
        state[name] = torch.cat(rows).reshape(ours[name].shape)
    model.load_state_dict(state, assign=True)


def _extract(model: nn.Module, table: dict[str, Place]) -> dict[str, Tensor]:
    ours = model.state_dict()
    return {
        key: ours[place.ours]
        .chunk(place.parts)[place.part]
        .reshape(_their_shape(ours[place.ours], place))
        .clone(memory_format=torch.contiguous_format)
        for key, place in table.items()
    }


def _their_shape(ours: Tensor, place: Place) -> torch.Size:
    rows = ours.shape[0] // place.parts
    return torch.Size([*[1] * place.batch_dim, rows, *ours.shape[1:], *[1] * place.unit_dims])


def _check_keys(state_dict: State, table: dict[str, Place], what: str) -> None:
    for problem, keys in (
        ("lacks", table.keys() - state_dict.keys()),
        ("also holds", state_dict.keys() - table.keys()),
    ):
        if keys:
            shown = ", ".join(sorted(keys)[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise ValueError(f"the state dict {problem} {shown}; accepted: exactly the keys of {what}")
