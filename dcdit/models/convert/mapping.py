"""What the converters share: tables from foreign keys to our weights, read in both directions."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dcdit.models.config import DCDiTConfig

StateDict = Mapping[str, Tensor]


class WeightSlice(NamedTuple):
    """Which rows of which of our tensors one foreign tensor holds. Foreign tensors of the same slice are copies."""

    name: str
    """Of our tensor."""
    part: int = 0
    parts: int = 1
    """Our rows are cut into ``parts`` equal runs; this is run number ``part``."""
    trailing_ones: int = 0
    """Last dimensions of size 1 that only the foreign tensor has (a 1x1 convolution where we have a Linear)."""
    leading_ones: int = 0
    """First dimensions of size 1 that only the foreign tensor has (the batch dimension of a position table)."""

    def foreign_shape(self, ours: Tensor) -> torch.Size:
        rows = ours.shape[0] // self.parts
        return torch.Size([*[1] * self.leading_ones, rows, *ours.shape[1:], *[1] * self.trailing_ones])


KeyTable = dict[str, WeightSlice]
"""Every key of a foreign state dict."""


def weight_and_bias(foreign: str, name: str, part: int = 0, parts: int = 1, trailing_ones: int = 0) -> KeyTable:
    """The two entries of a layer; the arguments are those of :class:`WeightSlice`."""
    return {
        f"{foreign}.weight": WeightSlice(f"{name}.weight", part, parts, trailing_ones),
        f"{foreign}.bias": WeightSlice(f"{name}.bias", part, parts),
    }


# --- moving tensors -----------------------------------------------------------------------------------------------


def import_weights(model: nn.Module, state_dict: StateDict, table: KeyTable, source: str, **computed: Tensor) -> None:
    """Give a model on the meta device the tensors of a foreign state dict.

    Args:
        model: changed in target.
        state_dict: the foreign weights. Every tensor keeps its dtype.
        table: of the foreign code base.
        source: what the state dict should be, for error messages.
        **computed: tensors of ours that the foreign state dict does not hold.

    Raises:
        ValueError: a key or a shape that does not fit, copies that differ, or several dtypes within one tensor of ours.
    """
    ours = model.state_dict()
    _check_keys(state_dict, table, source)
    parts: dict[str, dict[int, tuple[str, Tensor]]] = defaultdict(dict)
    for key, target in table.items():
        value, expected = state_dict[key], target.foreign_shape(ours[target.name])
        if value.shape != expected:
            raise ValueError(f"{key} has shape {tuple(value.shape)}; accepted: {tuple(expected)}")
        if not value.is_floating_point():
            raise ValueError(f"{key} is {value.dtype}; accepted: floating-point weights")
        first_key, first = parts[target.name].setdefault(target.part, (key, value))
        if first is not value and (first.dtype != value.dtype or not torch.equal(first, value)):
            raise ValueError(f"{key} differs from {first_key}; accepted: equal copies, for we keep one")
    state: dict[str, Tensor] = dict(computed)
    for name, found in parts.items():
        rows = [found[part][1].detach() for part in sorted(found)]
        if len({row.dtype for row in rows}) > 1:
            raise ValueError(
                f"{found[0][0]} and its siblings have several dtypes; accepted: one, for they become {name}"
            )
        state[name] = torch.cat(rows).reshape(ours[name].shape)
    model.load_state_dict(state, assign=True)


def export_weights(model: nn.Module, table: KeyTable) -> dict[str, Tensor]:
    """Copies of a model's weights under the keys and in the shapes of a foreign code base."""
    ours = model.state_dict()
    return {
        key: ours[target.name]
        .chunk(target.parts)[target.part]
        .reshape(target.foreign_shape(ours[target.name]))
        .clone(memory_format=torch.contiguous_format)
        for key, target in table.items()
    }


def _check_keys(state_dict: StateDict, table: KeyTable, source: str) -> None:
    for problem, keys in (
        ("lacks", table.keys() - state_dict.keys()),
        ("also holds", state_dict.keys() - table.keys()),
    ):
        if keys:
            shown = ", ".join(sorted(keys)[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise ValueError(f"the state dict {problem} {shown}; accepted: exactly the keys of {source}")


# --- sizes from shapes --------------------------------------------------------------------------------------------


def shapes_of(state_dict: StateDict, keys: Mapping[str, int], source: str) -> list[torch.Size]:
    """The shapes of these tensors.

    Args:
        keys: of the tensors, to the number of their dimensions.

    Raises:
        ValueError: one of them is missing or of other dimensions, so the state dict is of something else.
    """
    missing = [key for key in keys if not isinstance(state_dict.get(key), Tensor)]
    if missing:
        found = ", ".join(list(state_dict)[:3]) or "nothing"
        raise ValueError(
            f"not {source}: {missing[0]} is missing, found {found}, ...; accepted: the keys of its model.state_dict()"
        )
    for key, dims in keys.items():
        if state_dict[key].dim() != dims or not state_dict[key].numel():
            shape = tuple(state_dict[key].shape)
            raise ValueError(f"not {source}: {key} has shape {shape}; accepted: {dims} dimensions, none of them 0")
    return [state_dict[key].shape for key in keys]


def transformer_fields(
    state_dict: StateDict,
    blocks: str,
    num_heads: int,
    overrides: dict[str, Any],
    in_channels: int,
    out_channels: int,
    label_rows: int,
    fc1: torch.Size,
) -> dict[str, Any]:
    """The fields that :class:`DCDiTConfig` and :class:`dcdit.models.DiTConfig` have in common, and the overrides.

    Args:
        state_dict: its keys tell the depth.
        blocks: what the keys of the transformer blocks start with, before their number.
        num_heads, in_channels: as in the configuration.
        overrides: fields that the caller gives; they come last.
        out_channels: what the final layer predicts.
        label_rows: of the label table, null class included.
        fc1: shape of the first weight of an MLP.
    """
    if out_channels not in (in_channels, 2 * in_channels):
        raise ValueError(
            f"the final layer predicts {out_channels} channels; accepted: {in_channels} or {2 * in_channels}"
        )
    numbers = {int(found[1]) for key in state_dict if (found := re.match(re.escape(blocks) + r"(\d{1,9})\.", key))}
    null_class = overrides.get("class_dropout_prob", DCDiTConfig.class_dropout_prob) > 0
    return {
        "in_channels": in_channels,
        "hidden_size": fc1[1],
        "depth": len(numbers),
        "num_heads": num_heads,
        "mlp_ratio": fc1[0] / fc1[1],
        "num_classes": label_rows - null_class,
        "learn_sigma": out_channels == 2 * in_channels,
        **overrides,
    }


def square_grid(length: int) -> tuple[int, int]:
    """The sides of a square grid of that many positions."""
    side = math.isqrt(length)
    if side * side != length:
        raise ValueError(
            f"pos_embed has {length} positions, which is no square; accepted: grid=(H, W) with that product"
        )
    return side, side
