"""Plug-back: every grid position takes the smoothed row h' of its nearest kept token, and gives its gradient to it.

    out_l = h'_nearest(l) + residual_l        g_t = sum of grad_l over the positions l whose nearest token is t

Forward is one pass over the grid; neighbours share the rows of their tokens through the cache.

Backward sums the output gradient over the Voronoi region of each token, the positions nearest to it:

1. ``_bounding_box_kernel`` finds the bounding box of each region with integer minima and maxima, whose result does not
   depend on the order of the atomics.
2. ``_tile_sum_kernel`` sums each aligned 4 x 4 tile that lies in a single region.
3. ``_region_sum_kernel`` runs one program for each token and slice of the channels. It walks over the bounding box and
   takes a summed tile as one row.

So a region of A positions costs about A / 16 rows plus its border, one huge region is not one slow program, and no row
of the gradient is read twice. An image that keeps one token of L still leaves L / 16 rows to one program per slice:
accepted.

The gradient of the straight-through gate is ``<grad_l, h'_nearest(l)>``. It is taken where a row of grad is read.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcdit.kernels import launch
from dcdit.kernels.nearest import KeptIndex
from dcdit.kernels.numerics import cdiv, widest
from dcdit.kernels.rows import load_part, parts_of, rows_from, store_part

launch.set_default_configs(
    "plug_back_fwd",
    D={
        32: {"ROWS": 16, "num_warps": 4},
        256: {"ROWS": 1, "num_warps": 1},
    },
)
launch.set_default_configs("bounding_box", {"BLOCK": 256, "num_warps": 4})
launch.set_default_configs(
    "plug_back_bwd",
    D={
        32: {"BLOCK_D": 32, "num_warps": 1},
        1024: {"BLOCK_D": 256, "num_warps": 1},
    },
)

TILE = 4
_TILE = tl.constexpr(TILE)


@triton.jit
def _load_smoothed(h_ptr, h_minus_s_ptr, q_ptr, packed_row, known, channel, h_stride, D: tl.constexpr):
    """``h' = h - (1 - q) (h - s)`` of packed rows [N] at channels [C]: float32 [N, C], 0 where a row is not known."""
    buffer_row = packed_row.to(tl.int64)[:, None]
    inside = known[:, None] & (channel < D)[None, :]  # [N, C]
    q = tl.load(q_ptr + buffer_row, mask=known[:, None], other=0.0)  # [N, 1]
    h = tl.load(h_ptr + buffer_row * h_stride + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    h_minus_s = tl.load(h_minus_s_ptr + buffer_row * D + channel[None, :], mask=inside, other=0.0)
    return h - (1 - q) * h_minus_s


@triton.jit
def _plug_back_part(
    h_ptr, h_minus_s_ptr, residual_ptr, out_ptr, q, known, exists, FIRST: tl.constexpr, N: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    out = load_part(h_ptr, known, FIRST, N, D).to(tl.float32)  # [ROWS, N]
    if h_minus_s_ptr is not None:
        out -= (1 - q) * load_part(h_minus_s_ptr, known, FIRST, N, D)
    if residual_ptr is not None:
        out += load_part(residual_ptr, exists, FIRST, N, D).to(tl.float32)
    store_part(out_ptr, out, exists, FIRST, N, D)


@triton.jit(do_not_specialize=["positions"])
def _plug_back_fwd_kernel(
    h_ptr,  # (T, D), row stride h_stride; h' where h_minus_s is None
    h_minus_s_ptr,  # (T, D) float32, or None
    q_ptr,  # (T,) float32
    nearest_ptr,  # (S,) int32
    residual_ptr,  # (S, D), row stride residual_stride, or None
    out_ptr,  # (S, D), written
    positions, h_stride, residual_stride,  # positions: S = B * H * W
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program writes ROWS positions, whole rows at a time (see ``rows``)."""
    position, exists = rows_from(tl.program_id(0).to(tl.int64) * ROWS, positions, ROWS)
    token = tl.load(nearest_ptr + position, mask=position < positions, other=-1).to(tl.int64)
    known = exists & (token >= 0)
    q = tl.load(q_ptr + token, mask=token >= 0, other=0.0)
    h = h_ptr + token * h_stride
    h_minus_s = None if h_minus_s_ptr is None else h_minus_s_ptr + token * D
    residual = None if residual_ptr is None else residual_ptr + position * residual_stride
    out = out_ptr + position * D
    _plug_back_part(h, h_minus_s, residual, out, q, known, exists, 0, MAIN, D)
    if TAIL > 0:
        _plug_back_part(h, h_minus_s, residual, out, q, known, exists, MAIN, TAIL, D)


@triton.jit(do_not_specialize=["tokens"])
def _bounding_box_start_kernel(
    row_ptr,  # (T,) int32
    col_ptr,  # (T,) int32
    bounding_box_ptr,  # (T, 4) int32, written: top, left, bottom, right
    tokens,  # T
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Bounding boxes that hold the tokens themselves."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    row = tl.load(row_ptr + token, mask=token < tokens, other=0)
    col = tl.load(col_ptr + token, mask=token < tokens, other=0)
    tl.store(bounding_box_ptr + token * 4, row, mask=token < tokens)
    tl.store(bounding_box_ptr + token * 4 + 1, col, mask=token < tokens)
    tl.store(bounding_box_ptr + token * 4 + 2, row, mask=token < tokens)
    tl.store(bounding_box_ptr + token * 4 + 3, col, mask=token < tokens)


@triton.jit(do_not_specialize=["positions", "width"])
def _bounding_box_kernel(
    nearest_ptr,  # (S,) int32
    bounding_box_ptr,  # (T, 4) int32, grown: top, left, bottom, right
    positions, width,  # S, W
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A program grows the bounding boxes by BLOCK positions."""
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK], and so is all below
    inside = position < positions
    row, col = (position // width).to(tl.int32), (position % width).to(tl.int32)
    token = tl.load(nearest_ptr + position, mask=inside, other=-1)
    # A region is convex, so it crosses a row in one run, and the two ends of the run are enough.
    before = tl.load(nearest_ptr + position - 1, mask=inside & (col > 0), other=-1)
    after = tl.load(nearest_ptr + position + 1, mask=inside & (col + 1 < width), other=-1)
    is_left_end, is_right_end = (token >= 0) & (token != before), (token >= 0) & (token != after)
    token_box_ptr = bounding_box_ptr + token.to(tl.int64) * 4
    tl.atomic_min(token_box_ptr, row, mask=is_left_end, sem="relaxed")
    tl.atomic_min(token_box_ptr + 1, col, mask=is_left_end, sem="relaxed")
    tl.atomic_max(token_box_ptr + 2, row, mask=is_right_end, sem="relaxed")
    tl.atomic_max(token_box_ptr + 3, col, mask=is_right_end, sem="relaxed")


@triton.jit
def _add_owned(
    grad_ptr, nearest_ptr, gate_part_ptr, position, inside, token, smoothed, channel, total, D: tl.constexpr
):
    """``total`` [C] plus the gradients of those positions [N] whose nearest token is ``token``.

    Stores their ``<grad, h'>`` too, if gate_part is given; ``smoothed`` is then the h' [1, C] of the token.
    """
    owned = inside & (tl.load(nearest_ptr + position, mask=inside, other=-1) == token)  # [N]
    grad = tl.load(
        grad_ptr + position[:, None] * D + channel[None, :], mask=owned[:, None] & (channel < D)[None, :], other=0.0
    ).to(tl.float32)  # [N, C]  # fmt: skip
    if gate_part_ptr is not None:
        tl.store(gate_part_ptr + position, tl.sum(grad * smoothed, 1), mask=owned)
    return total + tl.sum(grad, 0)


@triton.jit
def _load_tile_owner(nearest_ptr, top, tile_row, tile_col, height, width):
    """The token whose region holds the whole tile, -1 where there is none."""
    index = tl.arange(0, _TILE * _TILE)  # [TILE * TILE]
    row, col = tile_row * _TILE + index // _TILE, tile_col * _TILE + index % _TILE
    exists = (row < height) & (col < width)
    owner = tl.load(nearest_ptr + (top + row).to(tl.int64) * width + col, mask=exists, other=-1)
    first = tl.max(owner, 0)
    return tl.where(tl.min(tl.where(exists, owner, first), 0) == first, first, -1)


@triton.jit
def _load_smoothed_for_gate(h_ptr, h_minus_s_ptr, q_ptr, gate_part_ptr, token, channel, h_stride, D: tl.constexpr):
    """h' of one token [1, C] if the gradient of the gate needs it, else 0."""
    if gate_part_ptr is not None:
        packed_row = tl.zeros((1,), tl.int32) + token
        return _load_smoothed(h_ptr, h_minus_s_ptr, q_ptr, packed_row, packed_row >= 0, channel, h_stride, D)
    else:  # Without the else, Triton would compile both returns.
        return 0.0


@triton.jit(do_not_specialize=["height", "width", "tiles_down", "tiles_across", "positions"])
def _tile_sum_kernel(
    grad_ptr,  # (S, D)
    h_ptr,  # (T, D), row stride h_stride
    h_minus_s_ptr,  # (T, D) float32
    q_ptr,  # (T,) float32
    nearest_ptr,  # (S,) int32
    tile_owner_ptr,  # (B * tiles_down * tiles_across,) int32, written
    tile_sum_ptr,  # (B * tiles_down * tiles_across, D) float32, written where a tile has an owner
    gate_part_ptr,  # (slices of D, S) float32, written for the positions of owned tiles, or None
    height, width, tiles_down, tiles_across, positions, h_stride,  # H, W, tiles of a grid, S
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program sums the gradient over one tile, if the tile lies in a single region."""
    tile = tl.program_id(0)
    tile_row, tile_col = tile // tiles_across % tiles_down, tile % tiles_across
    top = tile // tiles_across // tiles_down * height
    owner = _load_tile_owner(nearest_ptr, top, tile_row, tile_col, height, width)
    if tl.program_id(1) == 0:
        tl.store(tile_owner_ptr + tile, owner)
    if owner < 0:
        return
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    smoothed = _load_smoothed_for_gate(h_ptr, h_minus_s_ptr, q_ptr, gate_part_ptr, owner, channel, h_stride, D)
    if gate_part_ptr is not None:
        gate_part_ptr += tl.program_id(1).to(tl.int64) * positions
    total = tl.zeros((BLOCK_D,), tl.float32)
    col = tile_col * _TILE + tl.arange(0, _TILE)  # [TILE]
    for row in range(tile_row * _TILE, tl.minimum((tile_row + 1) * _TILE, height)):
        position = (top + row).to(tl.int64) * width + col  # [TILE]
        total = _add_owned(
            grad_ptr, nearest_ptr, gate_part_ptr, position, col < width, owner, smoothed, channel, total, D
        )  # fmt: skip
    tl.store(tile_sum_ptr + tile.to(tl.int64) * D + channel, total, mask=channel < D)


@triton.jit(do_not_specialize=["images", "height", "width", "tiles_down", "tiles_across", "positions", "tokens"])
def _region_sum_kernel(
    grad_ptr,  # (S, D)
    h_ptr,  # (T, D), row stride h_stride
    h_minus_s_ptr,  # (T, D) float32
    q_ptr,  # (T,) float32
    nearest_ptr,  # (S,) int32
    tile_owner_ptr,  # (B * tiles_down * tiles_across,) int32
    tile_sum_ptr,  # (B * tiles_down * tiles_across, D) float32
    bounding_box_ptr,  # (T, 4) int32
    cu_ptr,  # (B + 1,) int32
    g_ptr,  # (T, D) float32, written
    g_dot_s_ptr,  # (slices of D, T) float32, written, or None
    gate_part_ptr,  # (slices of D, S) float32, written for the positions of tiles without an owner, or None
    grad_h_ptr,  # (T, D), its padding rows are cleared, or None
    images, height, width, tiles_down, tiles_across, positions, tokens, h_stride,  # B, H, W, tiles of a grid, S, T
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program sums the gradient over the region of one token."""
    token = tl.program_id(0)
    row_offset = token.to(tl.int64) * D
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    inside = channel < D
    if token >= tl.load(cu_ptr + images):
        # A padding row has no region, and its gradient is zero.
        if grad_h_ptr is not None:
            tl.store(grad_h_ptr + row_offset + channel, tl.zeros((BLOCK_D,), tl.float32), mask=inside)
        return
    bounding_box_ptr += token.to(tl.int64) * 4
    image = tl.load(bounding_box_ptr) // height
    top = image * height
    first_row, last_row = tl.load(bounding_box_ptr) - top, tl.load(bounding_box_ptr + 2) - top
    first_col, last_col = tl.load(bounding_box_ptr + 1), tl.load(bounding_box_ptr + 3)
    rows, cols = last_row - first_row + 1, last_col - first_col + 1
    smoothed = _load_smoothed_for_gate(h_ptr, h_minus_s_ptr, q_ptr, gate_part_ptr, token, channel, h_stride, D)
    if gate_part_ptr is not None:
        gate_part_ptr += tl.program_id(1).to(tl.int64) * positions
    total = tl.zeros((BLOCK_D,), tl.float32)
    offset = tl.arange(0, _TILE)  # [TILE]
    # A step takes four positions: a row of a tile that the bounding box touches or, where the box is too narrow to hold
    # a tile (as most are), a run in the box. One loop for both: another copy of its body would claim registers.
    by_tile = tl.minimum(rows, cols) >= _TILE
    first_tile_row, first_tile_col = first_row // _TILE, first_col // _TILE
    tile_cols = last_col // _TILE - first_tile_col + 1
    tile_rows = last_row // _TILE - first_tile_row + 1
    steps = tl.where(by_tile, tile_rows * tile_cols * _TILE, tl.cdiv(rows * cols, _TILE))
    step = 0
    while step < steps:
        tile_row = first_tile_row + step // _TILE // tile_cols
        tile_col = first_tile_col + step // _TILE % tile_cols
        tile = (image.to(tl.int64) * tiles_down + tile_row) * tiles_across + tile_col
        if tl.load(tile_owner_ptr + tile, mask=by_tile, other=-1) == token:
            total += tl.load(tile_sum_ptr + tile * D + channel, mask=inside, other=0.0)
            step += _TILE
        else:
            index = step * _TILE + offset
            row = tl.where(by_tile, tile_row * _TILE + step % _TILE, first_row + index // cols)
            col = tl.where(by_tile, tile_col * _TILE + offset, first_col + index % cols)
            position = (top + row).to(tl.int64) * width + col  # [TILE]
            in_box = (row <= last_row) & (col <= last_col)
            total = _add_owned(
                grad_ptr, nearest_ptr, gate_part_ptr, position, in_box, token, smoothed, channel, total, D
            )  # fmt: skip
            step += 1
    tl.store(g_ptr + row_offset + channel, total, mask=inside)
    if g_dot_s_ptr is not None:
        h = tl.load(h_ptr + token.to(tl.int64) * h_stride + channel, mask=inside, other=0.0).to(tl.float32)
        h_minus_s = tl.load(h_minus_s_ptr + row_offset + channel, mask=inside, other=0.0)
        tl.store(g_dot_s_ptr + tl.program_id(1).to(tl.int64) * tokens + token, tl.sum(total * (h - h_minus_s), 0))


def plug_back_fwd(
    h: Tensor, h_minus_s: Tensor | None, index: KeptIndex, nearest: Tensor, residual: Tensor | None
) -> Tensor:
    """(T, D) tokens, float32 (T, D) ``h - s``, int32 (S,) nearest packed rows, (S, D) residual -> (S, D).

    h' of the nearest token plus the residual, rounded once to the wider dtype of h and residual; both have a unit last
    stride. Without ``h - s``, h is h'.
    """
    positions, d = nearest.shape[0], h.shape[1]
    out = launch.empty((positions, d), widest(h, residual), h.device)
    config = launch.config_for("plug_back_fwd", h.device, D=d)
    launch.launch(
        _plug_back_fwd_kernel, (cdiv(positions, config["ROWS"]),),
        h, h_minus_s, index.clamped_prob, nearest, residual, out, positions, h.stride(0),
        0 if residual is None else residual.stride(0), D=d, **parts_of(d), **config,
    )  # fmt: skip
    return out


def plug_back_bwd(
    grad: Tensor, h: Tensor, h_minus_s: Tensor, index: KeptIndex, nearest: Tensor, cu_seqlens: Tensor,
    grid: tuple[int, int], grad_h: Tensor | None, want_g_dot_s: bool, want_gate: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """g, the gradient of the rows h', from the gradient of the grid.

    Args:
        grad: contiguous (S, D) gradient of the output.
        grad_h: (T, D); its padding rows are set to zero here.
        want_g_dot_s: also ``<g_t, s_t>`` of every token, in parts.
        want_gate: also ``<grad_l, h'_nearest(l)>`` of every position, in parts.

    Returns:
        g, (T, D) float32 with padding rows unwritten, and the two in float32 (parts, T) and (parts, S), to be summed
        over parts; positions of an image without tokens stay unwritten.
    """
    height, width = grid
    (tokens, d), positions, device = h.shape, nearest.shape[0], h.device
    bounding_box = launch.empty((tokens, 4), torch.int32, device)
    config: dict[str, Any] = launch.config_for("bounding_box", device)
    launch.launch(
        _bounding_box_start_kernel, (cdiv(tokens, config["BLOCK"]),), index.row, index.col, bounding_box, tokens,
        **config,
    )  # fmt: skip
    launch.launch(
        _bounding_box_kernel, (cdiv(positions, config["BLOCK"]),), nearest, bounding_box, positions, width, **config
    )  # fmt: skip

    config = launch.config_for("plug_back_bwd", device, D=d)
    parts = cdiv(d, config["BLOCK_D"])
    images, tile_grid = cu_seqlens.shape[0] - 1, (cdiv(height, TILE), cdiv(width, TILE))
    tiles = images * tile_grid[0] * tile_grid[1]
    tile_owner, tile_sum = launch.empty((tiles,), torch.int32, device), launch.empty((tiles, d), torch.float32, device)
    g = launch.empty((tokens, d), torch.float32, device)
    g_dot_s = launch.empty((parts, tokens), torch.float32, device) if want_g_dot_s else None
    gate_part = launch.empty((parts, positions), torch.float32, device) if want_gate else None
    inputs = grad, h, h_minus_s, index.clamped_prob, nearest
    launch.launch(
        _tile_sum_kernel, (tiles, parts), *inputs, tile_owner, tile_sum, gate_part,
        height, width, *tile_grid, positions, h.stride(0), D=d, **config,
    )  # fmt: skip
    launch.launch(
        _region_sum_kernel, (tokens, parts), *inputs, tile_owner, tile_sum, bounding_box, cu_seqlens,
        g, g_dot_s, gate_part, grad_h, images, height, width, *tile_grid, positions, tokens, h.stride(0),
        D=d, **config,
    )  # fmt: skip
    return g, g_dot_s, gate_part
