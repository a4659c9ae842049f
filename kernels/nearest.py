"""Index of the kept tokens of a grid, and the nearest kept token of every position.

``nearest[i] = argmin_t (row_i - row_t)^2 + (col_i - col_t)^2`` over the kept tokens t of the image of position i; ties
go to the lowest raster index. Rows are those of all grids of the batch, stacked: row r of image b is ``b * H + r``.
Packed rows follow the raster order, so the packed row of a token is the number of kept tokens before it.

1. ``kept_index_fwd`` passes over the grid once and writes ``prefix_count``, the number of kept tokens before each
   column of each row. The kept tokens of the columns ``left <= col < right`` of a row are then the packed rows
   ``prefix_count[left]`` to ``prefix_count[right] - 1``. The two next to a column are ``prefix_count[col] - 1``, on its
   left, and ``prefix_count[col]``, on it or on its right.
2. ``nearest_fwd`` looks from each position at rows farther and farther away, up and down. It stops at a row that is
   farther away than the nearest token so far. A position reads as many rows as its token is away, at most the height of
   the grid, whatever the mask.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcdit.kernels import launch
from dcdit.kernels.numerics import PROB_EPS, cdiv

launch.set_default_configs("kept_index", {"LINES": 4, "BLOCK": 64, "num_warps": 2})
launch.set_default_configs("nearest", {"BLOCK": 128, "num_warps": 4})

_PROB_EPS = tl.constexpr(PROB_EPS)
_INT32_MAX = tl.constexpr(2**31 - 1)

MAX_SIDE = 32767
"""Squared distances are int32."""


class KeptIndex(NamedTuple):
    """Where the kept tokens are. Entries of padding rows are unwritten, and never read."""

    prefix_count: Tensor
    """(B * H, W + 1) int32: kept tokens of the batch before a column of a row; 2^31 - 1 all along a row without any."""
    row: Tensor
    """(T,) int32: row of each token in the stacked grids."""
    col: Tensor
    """(T,) int32: column of each token."""
    clamped_prob: Tensor
    """(T,) float32: q = clamp(p, 1e-4, 1 - 1e-4)."""


@triton.jit(do_not_specialize=["rows", "width"])
def _kept_index_kernel(
    packed_rows_ptr,  # (B, H, W) int32
    p_ptr,  # (B, H, W)
    prefix_ptr,  # (B * H, W + 1) int32, written
    row_ptr,  # (T,) int32, written
    col_ptr,  # (T,) int32, written
    q_ptr,  # (T,) float32, written
    rows, width,  # B * H, W
    LINES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program writes the index of LINES rows of the grids, BLOCK columns at a time."""
    row = tl.program_id(0) * LINES + tl.arange(0, LINES)  # [LINES]
    exists = row < rows
    row_start = row.to(tl.int64) * width
    prefix_ptr += row.to(tl.int64) * (width + 1)
    prefix = tl.full((LINES,), _INT32_MAX, tl.int32)
    for start in range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK)  # [BLOCK]
        inside = exists[:, None] & (col < width)[None, :]  # [LINES, BLOCK]
        packed_row = tl.load(packed_rows_ptr + row_start[:, None] + col[None, :], mask=inside, other=-1)
        prefix = tl.minimum(prefix, tl.min(tl.where(packed_row >= 0, packed_row, _INT32_MAX), 1))
    # The kept tokens of a row have consecutive packed rows: after the first one, counting is enough.
    for start in range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK)  # [BLOCK]
        inside = exists[:, None] & (col < width)[None, :]  # [LINES, BLOCK]
        packed_row = tl.load(packed_rows_ptr + row_start[:, None] + col[None, :], mask=inside, other=-1)
        kept = packed_row >= 0
        count = kept.to(tl.int32)
        before = tl.cumsum(count, 1) - count
        tl.store(prefix_ptr[:, None] + col[None, :], prefix[:, None] + before, mask=inside)
        prefix += tl.sum(count, 1)
        p = tl.load(p_ptr + row_start[:, None] + col[None, :], mask=kept, other=0.0).to(tl.float32)
        tl.store(row_ptr + packed_row, tl.broadcast_to(row[:, None], (LINES, BLOCK)), mask=kept)
        tl.store(col_ptr + packed_row, tl.broadcast_to(col[None, :], (LINES, BLOCK)), mask=kept)
        tl.store(q_ptr + packed_row, tl.minimum(tl.maximum(p, _PROB_EPS), 1 - _PROB_EPS), mask=kept)
    tl.store(prefix_ptr + width, prefix, mask=exists)


@triton.jit(do_not_specialize=["positions", "height", "width"])
def _nearest_kernel(
    prefix_ptr,  # (B * H, W + 1) int32
    col_ptr,  # (T,) int32
    nearest_ptr,  # (B * H * W,) int32, written
    positions, height, width,  # B * H * W, H, W
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A program finds the nearest tokens of BLOCK positions."""
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK], and so is all below
    inside = position < positions
    row, col = (position // width).to(tl.int32), (position % width).to(tl.int32)
    top = row // height * height
    best_distance = tl.where(inside, _INT32_MAX, -1)
    best_token = tl.full((BLOCK,), -1, tl.int32)
    rows_away = 0
    while (rows_away < height) & (rows_away * rows_away <= tl.max(best_distance, 0)):
        for below in tl.static_range(2):
            other_row = row + (2 * below - 1) * rows_away
            exists = inside & (other_row >= top) & (other_row < top + height)
            prefix_row_ptr = prefix_ptr + other_row.to(tl.int64) * (width + 1)
            first = tl.load(prefix_row_ptr, mask=exists, other=0)
            end = tl.load(prefix_row_ptr + width, mask=exists, other=0)
            at_or_right = tl.load(prefix_row_ptr + col, mask=exists, other=0)
            for left in tl.static_range(2):
                token = at_or_right - left
                valid = (token >= first) & (token < end)
                cols_away = tl.load(col_ptr + token, mask=valid, other=0) - col
                distance = cols_away * cols_away + rows_away * rows_away
                # Packed rows are in raster order, so the lower one is the lower raster index.
                closer = valid & (
                    (distance < best_distance) | ((distance == best_distance) & (token < best_token))
                )  # fmt: skip
                best_distance = tl.where(closer, distance, best_distance)
                best_token = tl.where(closer, token, best_token)
        rows_away += 1
    tl.store(nearest_ptr + position, best_token, mask=inside)


def kept_index_fwd(packed_rows: Tensor, p: Tensor, grid: tuple[int, int], tokens: int) -> KeptIndex:
    """Contiguous (B, L) int32 packed_rows (-1: not kept), contiguous (B, L) p, number of packed rows T -> KeptIndex.

    Raises:
        ValueError: a side of the grid is too long for int32 squared distances.
    """
    height, width = grid
    if max(grid) > MAX_SIDE:
        raise ValueError(f"grid is {tuple(grid)}; the Triton backend accepts sides up to {MAX_SIDE}")
    rows, device = packed_rows.shape[0] * height, packed_rows.device
    index = KeptIndex(
        prefix_count=launch.empty((rows, width + 1), torch.int32, device),
        row=launch.empty((tokens,), torch.int32, device),
        col=launch.empty((tokens,), torch.int32, device),
        clamped_prob=launch.empty((tokens,), torch.float32, device),
    )
    config = launch.config_for("kept_index", device)
    launch.launch(_kept_index_kernel, (cdiv(rows, config["LINES"]),), packed_rows, p, *index, rows, width, **config)
    return index


def nearest_fwd(index: KeptIndex, grid: tuple[int, int]) -> Tensor:
    """Index of B grids -> (B * L,) int32: packed row of the nearest kept token, -1 in an image that keeps none.

    Exact; equal distances go to the lowest raster index.
    """
    height, width = grid
    positions, device = index.prefix_count.shape[0] * width, index.prefix_count.device
    nearest = launch.empty((positions,), torch.int32, device)
    config = launch.config_for("nearest", device)
    launch.launch(
        _nearest_kernel, (cdiv(positions, config["BLOCK"]),), index.prefix_count, index.col, nearest,
        positions, height, width, **config,
    )  # fmt: skip
    return nearest
