"""Arguments of the operations, for the tests of every backend.

Each function returns the arguments of the operation of its name, in order. Tensors are strided as a model strides them
(slices of wider rows), and padding rows hold NaN.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from support.inputs import (
    ODD_PATTERNS,
    PATTERNS,
    generator,
    randn,
    random_cu_seqlens,
    random_probs,
    random_selection,
    ste_coefficient,
)
from torch import Tensor

from dcdit import ops
from dcdit.ops import TokenSelection, reference

Device = torch.device | str
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def moved(value: Any, device: Device) -> Any:
    """A tensor, or the tensors of a selection, on a device; everything else as it is."""
    if isinstance(value, TokenSelection):
        return TokenSelection(*(moved(field, device) for field in value))
    return value.to(device) if isinstance(value, Tensor) else value


# --- boundary probabilities ---------------------------------------------------------------------------------------


def boundary_prob_cosine(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: Device = "cpu"
) -> tuple[Tensor, Tensor]:
    """q and k of (B, L, D) or (S, D), slices of one wider tensor, as a joint projection gives them.

    k is parallel to q at position 1 and opposite at position 2: p is 0 and 1 there, and the gradients are 0.
    """
    joint = randn(*shape[:-1], 2 * shape[-1], dtype=dtype, seed=seed).to(device)
    q, k = joint.chunk(2, dim=-1)
    if shape[-2] > 3:  # At least one more row has a gradient: it sets the size of an ulp.
        k[..., 1, :], k[..., 2, :] = 2 * q[..., 0, :], -q[..., 1, :]
    return q, k


def boundary_prob_cosine2d(
    images: int,
    grid: tuple[int, int],
    width: int,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype = torch.float32,
    spread: float = 0.3,
    seed: int = 0,
    device: Device = "cpu",
) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """q and k are slices of one wider tensor. A large ``spread`` of the weights takes p to both ends of the clamp."""
    joint = randn(images, grid[0] * grid[1], 2 * width, dtype=dtype, seed=seed).to(device)
    weight = (spread * randn(width, 3, 3, seed=seed + 1) + 1 / 9).to(device, weight_dtype)
    q, k = joint.chunk(2, dim=-1)
    return q, k, weight, grid


MEMORY_FORMATS = ["channels_first", "channels_last", "sliced channels_first", "sliced channels_last", "neither"]
"""Positions side by side, channels side by side, each cut from more channels too, or strided both ways."""


def predictability_features(
    memory_format: str, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: Device = "cpu"
) -> Tensor:
    """(B, C, H, W) in one of :data:`MEMORY_FORMATS`."""
    b, c, h, w = shape
    if memory_format == "neither":
        return randn(b, h, w, 2 * c, dtype=dtype, seed=seed).to(device).permute(0, 3, 1, 2)[:, ::2]
    x = randn(b, 2 * c, h, w, dtype=dtype, seed=seed).to(device)
    if "channels_last" in memory_format:
        x = x.contiguous(memory_format=torch.channels_last)
    memory = torch.channels_last if memory_format == "channels_last" else torch.contiguous_format
    return x[:, c:] if "sliced" in memory_format else x[:, c:].contiguous(memory_format=memory)


def predictability_parameters(
    channels: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: Device = "cpu"
) -> list[Tensor]:
    """norm_weight, norm_bias and out_weight (C,), out_bias ()."""
    norm_weight, norm_bias, out_weight = (randn(channels, seed=seed + i) for i in range(1, 4))
    made = (1 + 0.3 * norm_weight, 0.3 * norm_bias, out_weight / channels**0.5, randn(seed=seed + 4))
    return [value.to(device, dtype) for value in made]


# --- selection ----------------------------------------------------------------------------------------------------


SELECTION_MODES = ["drop", "budget", "capacity", "max_seqlen"]


@st.composite
def select_tokens(
    draw: st.DrawFn, mode: str, dtypes: list[torch.dtype] = DTYPES
) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """p, cu_seqlens (None for a grid batch), and the other arguments by name."""
    probs = {
        "pattern": draw(st.sampled_from(sorted({*PATTERNS, *ODD_PATTERNS} - {"long"}))),
        "dtype": draw(st.sampled_from(dtypes)),
        "seed": draw(st.integers(0, 99)),
        "keep": 0.5,
    }
    if draw(st.booleans()):
        images, length = draw(st.integers(0, 4)), draw(st.integers(1, 40))
        p, cu_seqlens, shortest = random_probs(images, length, **probs), None, length
    else:
        lengths = draw(st.lists(st.integers(1 if mode == "budget" else 0, 25), max_size=6))
        p = random_probs(max(1, sum(lengths)), **probs)[: sum(lengths)]
        images, cu_seqlens, shortest = len(lengths), random_cu_seqlens(*lengths), min(lengths, default=1)
    if mode == "budget":
        arguments: dict[str, Any] = {"budget": draw(st.integers(1, shortest))} if images else {}
        if images and draw(st.booleans()):
            p = p.clamp(0, 1)
            arguments["always"] = _few_always(draw, p, cu_seqlens, arguments["budget"])
        return p, cu_seqlens, arguments
    fractions = st.floats(0, 1, exclude_max=True, width=32) | st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9, 0.9999999])
    arguments = {"threshold": draw(st.sampled_from([0.5, 0.5, 0.25, 0.3, 0.0, 0.75, 1.0]))}
    if draw(st.booleans()):
        arguments["drop_fraction"] = draw(fractions)
    else:
        per_image = draw(st.lists(fractions, min_size=images, max_size=images))
        arguments["drop_fraction"] = torch.tensor(per_image, dtype=torch.float32)
    if draw(st.booleans()):
        p, share = p.clamp(0, 1), draw(st.sampled_from([0.1, 0.5, 1.0]))
        arguments["always"] = torch.rand(p.shape, generator=generator(draw(st.integers(0, 99)))) < share
    if mode == "max_seqlen":
        arguments["max_seqlen"] = draw(st.integers(1, 45))
    if mode == "capacity" or (mode == "max_seqlen" and draw(st.booleans())):
        kept = reference.select_tokens(p, cu_seqlens, **arguments).indices.shape[0]
        near = st.integers(kept - 3, kept + 1)
        arguments["capacity"] = max(images, draw(near | st.integers(0, kept) | st.just(2 * p.numel() + 40)))
    return p, cu_seqlens, arguments


def _few_always(draw: st.DrawFn, p: Tensor, cu_seqlens: Tensor | None, most: int) -> Tensor:
    """A mask of at most so many tokens of each image."""
    rank = torch.rand(p.shape, generator=generator(draw(st.integers(0, 99)))).flatten()
    starts = range(0, p.numel() + 1, p.shape[1]) if cu_seqlens is None else cu_seqlens.tolist()
    always = torch.zeros_like(rank, dtype=torch.bool)
    for lo, hi in pairwise(starts):
        always[lo + rank[lo:hi].argsort()[: draw(st.integers(0, most))]] = True
    return always.view(p.shape)


@st.composite
def select_from_mask(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """mask, cu_seqlens (None for a grid batch), and the other arguments by name."""
    p, cu_seqlens, _ = draw(select_tokens("drop"))
    mask = (p > 0.5) & (torch.rand(p.shape, generator=generator(draw(st.integers(0, 99)))) < 0.7)
    arguments: dict[str, Any] = {}
    if draw(st.booleans()):
        images = mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        arguments["capacity"] = max(images, int(mask.sum()) + draw(st.integers(-9, 9)))
    if draw(st.booleans()):
        arguments["max_seqlen"] = draw(st.integers(1, 45))
    return mask, cu_seqlens, arguments


def with_extra_tokens(arguments: dict[str, Any], images: int, extra_tokens: int) -> dict[str, Any]:
    """The arguments of a selection of a grid batch, with sizes that leave as much for the grid."""
    sizes = {"budget": extra_tokens, "max_seqlen": extra_tokens, "capacity": images * extra_tokens}
    more = {name: arguments[name] + size for name, size in sizes.items() if name in arguments}
    return {**arguments, **more, "extra_tokens": extra_tokens}


# --- packing ------------------------------------------------------------------------------------------------------

INTEGERS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
TOKENS = [(), (3,), (2, 8), (1, 2, 5)]
"""Shapes of a token."""


def integers(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Integers of all sizes, also those that no float holds."""
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator(seed)) < 0.5
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max, shape, dtype=dtype, generator=generator(seed))


# --- de-chunking --------------------------------------------------------------------------------------------------


def packed_tokens(sel: TokenSelection, width: int, dtype: torch.dtype, seed: int, device: Device) -> Tensor:
    """h (T, D), a slice of wider rows; NaN in padding rows."""
    h = randn(sel.indices.shape[0], 2 * width, dtype=dtype, seed=seed).to(device)[:, width:]
    h[int(sel.cu_seqlens[-1]) :] = float("nan")
    return h


def dechunk_ema(
    p: Tensor,
    sel: TokenSelection,
    width: int = 8,
    dtype: torch.dtype = torch.float32,
    gate: bool = True,
    residual: bool = True,
    seed: int = 0,
    device: Device = "cpu",
) -> tuple[Any, ...]:
    h = packed_tokens(sel, width, dtype, seed + 1, device)
    c = ste_coefficient(p).to(device) if gate else None
    # Moved before it is sliced: a move would make the slice contiguous.
    added = randn(*p.shape, 2 * width, dtype=dtype, seed=seed + 2).to(device)[..., :width] if residual else None
    return h, moved(p, device), moved(sel, device), c, added


def dechunk_spatial(
    images: int,
    grid: tuple[int, int],
    width: int = 8,
    dtype: torch.dtype = torch.float32,
    sigma: float = 1.0,
    pattern: str = "random",
    gate: bool = True,
    residual: bool = True,
    seed: int = 0,
    device: Device = "cpu",
    **mode: Any,
) -> tuple[Any, ...]:
    """``mode`` is how ``select_tokens`` chooses."""
    selection = random_selection(images, grid[0] * grid[1], pattern=pattern, seed=seed, **mode)
    h, p, sel, c, added = dechunk_ema(*selection, width, dtype, gate, residual, seed, device)
    return h, p, sel, grid, sigma, c, added


# --- group norm ---------------------------------------------------------------------------------------------------


def group_norm_silu(
    layout: str,
    *shape: int,
    groups: int,
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype = torch.float32,
    shifted: bool = True,
    mean: float = 0.0,
    seed: int = 0,
    device: Device = "cpu",
) -> tuple[Any, ...]:
    """x of (B, C, H, W) in one of :data:`MEMORY_FORMATS`, or as ``tokens`` (B, L, C); the shift is a slice."""
    images, channels = shape[:2]
    made = "channels_last" if layout == "tokens" else layout
    x = predictability_features(made, *shape, dtype=dtype, seed=seed, device=device)
    if mean:
        x.add_(mean)
    if layout == "tokens":
        x = x.permute(0, 2, 3, 1).flatten(1, 2)
    weight, bias, *_ = predictability_parameters(channels, parameter_dtype, seed, device)
    table = randn(images, 2 * channels, dtype=parameter_dtype, seed=seed + 5).to(device)
    return x, groups, weight, bias, table[:, channels:] if shifted else None, 1e-5


# --- modulation ---------------------------------------------------------------------------------------------------


def modulation(
    op: Callable[..., Any],
    lengths: Sequence[int],
    width: int,
    dtype: torch.dtype = torch.float32,
    table_dtype: torch.dtype = torch.float32,
    padding: int = 0,
    seed: int = 0,
    device: Device = "cpu",
) -> tuple[Any, ...]:
    """Arguments of one of the three operations: the modulation is columns of one (B, 6D) tensor, y a slice of rows."""
    rows = sum(lengths) + padding
    x = randn(rows, width, dtype=dtype, seed=seed).to(device)
    y = randn(rows, 2 * width, dtype=dtype, seed=seed + 1).to(device)[:, width:]
    table = randn(len(lengths), 6 * width, dtype=table_dtype, seed=seed + 2).to(device)
    gate, shift, scale = table.chunk(6, dim=1)[1:4]
    cu_seqlens = random_cu_seqlens(*lengths).to(device)
    if op is ops.modulated_layer_norm:
        return x, shift, scale, cu_seqlens, 1e-6
    return (x, y, gate, cu_seqlens) if op is ops.gated_add else (x, y, gate, shift, scale, cu_seqlens, 1e-6)


def affine_norm(
    op: Callable[..., Any],
    lengths: Sequence[int],
    width: int,
    dtype: torch.dtype = torch.float32,
    table_dtype: torch.dtype = torch.float32,
    padding: int = 0,
    parts: str = "shift weight bias",
    seed: int = 0,
    device: Device = "cpu",
) -> tuple[Any, ...]:
    """Arguments of a modulated norm, with the named parts alone. LayerNorm always has a shift, RMSNorm never a bias."""
    x, shift, scale, cu_seqlens, eps = modulation(
        ops.modulated_layer_norm, lengths, width, dtype, table_dtype, padding, seed, device
    )
    weight, bias = (randn(width, dtype=table_dtype, seed=seed + i).to(device) for i in (3, 4))
    weight = weight if "weight" in parts else None
    if op is ops.modulated_rms_norm:
        return x, shift if "shift" in parts else None, scale, cu_seqlens, eps, weight
    return x, shift, scale, cu_seqlens, eps, weight, bias if "bias" in parts else None
