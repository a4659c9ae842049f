"""Plug-back: every grid position takes the smoothed row of its nearest kept token, and hands its gradient back to it.

Forward is one pass over the grid; the rows of the tokens are read through the cache, neighbours share them.

Backward sums the output gradient over each token's cell: one small program per token and slice of the channels walks
over the cell's bounding box (found with integer minima and maxima, which no order of arrival changes). What keeps one
huge cell from being one slow program: the aligned 4 x 4 tiles that lie in a single cell are summed beforehand, each by
its own program, and enter as one row. So a cell of A positions costs about A / 16 rows plus its border, and no
gradient row is read twice. An image that keeps one token out of L still leaves L / 16 rows to one program per slice:
accepted.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcdit.kernels import launch
from dcdit.kernels.nearest import Survey
from dcdit.kernels.numerics import cdiv

launch.set_default_configs(
    "plug_back_fwd",
    D={
        32: {"ROWS": 16, "BLOCK_D": 32, "num_warps": 4},
        1024: {"ROWS": 8, "BLOCK_D": 256, "num_warps": 4},
    },
)
launch.set_default_configs("plug_back_box", {"BLOCK": 256, "num_warps": 4})
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
def _token_row(h_ptr, detail_ptr, q_ptr, slot, known, channel, h_stride, D: tl.constexpr):
    """``h' = h - (1 - q) (h - s)`` of packed_rows [N] at ``channel`` [C], float32; zero where the slot is not known."""
    slot = slot.to(tl.int64)[:, None]
    inside = known[:, None] & (channel < D)[None, :]
    q = tl.load(q_ptr + slot, mask=known[:, None], other=0.0)
    h = tl.load(h_ptr + slot * h_stride + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    detail = tl.load(detail_ptr + slot * D + channel[None, :], mask=inside, other=0.0)
    return h - (1 - q) * detail


@triton.jit(do_not_specialize=["positions"])
def _plug_back_fwd_kernel(
    h_ptr, detail_ptr, q_ptr, nearest_ptr, residual_ptr, out_ptr, positions, h_stride, residual_stride,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    inside = (row < positions)[:, None] & (channel < D)[None, :]
    slot = tl.load(nearest_ptr + row, mask=row < positions, other=-1)
    value = _token_row(h_ptr, detail_ptr, q_ptr, slot, slot >= 0, channel, h_stride, D)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row[:, None] * residual_stride + channel[None, :], mask=inside, other=0.0)
        value += residual.to(tl.float32)
    tl.store(out_ptr + row[:, None] * D + channel[None, :], value, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _box_start_kernel(row_ptr, col_ptr, box_ptr, tokens, BLOCK: tl.constexpr):
    """Boxes (top, left, bottom, right) that hold the tokens themselves."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(row_ptr + token, mask=token < tokens, other=0)
    col = tl.load(col_ptr + token, mask=token < tokens, other=0)
    tl.store(box_ptr + token * 4, row, mask=token < tokens)
    tl.store(box_ptr + token * 4 + 1, col, mask=token < tokens)
    tl.store(box_ptr + token * 4 + 2, row, mask=token < tokens)
    tl.store(box_ptr + token * 4 + 3, col, mask=token < tokens)


@triton.jit(do_not_specialize=["positions", "width"])
def _box_kernel(nearest_ptr, box_ptr, positions, width, BLOCK: tl.constexpr):
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = position < positions
    row, col = (position // width).to(tl.int32), (position % width).to(tl.int32)
    slot = tl.load(nearest_ptr + position, mask=inside, other=-1)
    # A cell is convex, so it crosses a row in one run: the ends of the run are all there is to say.
    before = tl.load(nearest_ptr + position - 1, mask=inside & (col > 0), other=-1)
    after = tl.load(nearest_ptr + position + 1, mask=inside & (col + 1 < width), other=-1)
    opens, closes = (slot >= 0) & (slot != before), (slot >= 0) & (slot != after)
    box = box_ptr + slot.to(tl.int64) * 4
    tl.atomic_min(box, row, mask=opens, sem="relaxed")
    tl.atomic_min(box + 1, col, mask=opens, sem="relaxed")
    tl.atomic_max(box + 2, row, mask=closes, sem="relaxed")
    tl.atomic_max(box + 3, col, mask=closes, sem="relaxed")


@triton.jit
def _add_positions(grad_ptr, nearest_ptr, gate_part_ptr, place, inside, token, value, channel, total, D: tl.constexpr):
    """Add the gradients [C] of those positions [N] that belong to the token; leave their ``<g, h'>``, if asked for."""
    mine = inside & (tl.load(nearest_ptr + place, mask=inside, other=-1) == token)
    grad = tl.load(
        grad_ptr + place[:, None] * D + channel[None, :], mask=mine[:, None] & (channel < D)[None, :], other=0.0
    ).to(tl.float32)  # fmt: skip
    if gate_part_ptr is not None:
        tl.store(gate_part_ptr + place, tl.sum(grad * value, 1), mask=mine)
    return total + tl.sum(grad, 0)


@triton.jit
def _tile_owner(nearest_ptr, top, tile_row, tile_col, height, width):
    """The token whose cell holds the whole tile, -1 where there is none."""
    place = tl.arange(0, _TILE * _TILE)
    row, col = tile_row * _TILE + place // _TILE, tile_col * _TILE + place % _TILE
    exists = (row < height) & (col < width)
    owner = tl.load(nearest_ptr + (top + row).to(tl.int64) * width + col, mask=exists, other=-1)
    first = tl.max(owner, 0)
    return tl.where(tl.min(tl.where(exists, owner, first), 0) == first, first, -1)


@triton.jit
def _gate_row(h_ptr, detail_ptr, q_ptr, gate_part_ptr, token, channel, h_stride, D: tl.constexpr):
    """h' of one token [1, C], if it is needed."""
    if gate_part_ptr is not None:
        one = tl.zeros((1,), tl.int32) + token
        return _token_row(h_ptr, detail_ptr, q_ptr, one, one >= 0, channel, h_stride, D)
    else:  # Triton would compile both returns otherwise.
        return 0.0


@triton.jit(do_not_specialize=["height", "width", "tiles_down", "tiles_across", "positions"])
def _tile_sum_kernel(
    grad_ptr, h_ptr, detail_ptr, q_ptr, nearest_ptr, tile_owner_ptr, tile_sum_ptr, gate_part_ptr,
    height, width, tiles_down, tiles_across, positions, h_stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient sums of the tiles that lie in one cell; the other rows of ``tile_sum`` stay unwritten."""
    tile = tl.program_id(0)
    tile_row, tile_col = tile // tiles_across % tiles_down, tile % tiles_across
    top = tile // tiles_across // tiles_down * height
    owner = _tile_owner(nearest_ptr, top, tile_row, tile_col, height, width)
    if tl.program_id(1) == 0:
        tl.store(tile_owner_ptr + tile, owner)
    if owner < 0:
        return
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    value = _gate_row(h_ptr, detail_ptr, q_ptr, gate_part_ptr, owner, channel, h_stride, D)
    if gate_part_ptr is not None:
        gate_part_ptr += tl.program_id(1).to(tl.int64) * positions
    total = tl.zeros((BLOCK_D,), tl.float32)
    col = tile_col * _TILE + tl.arange(0, _TILE)
    for row in range(tile_row * _TILE, tl.minimum((tile_row + 1) * _TILE, height)):
        place = (top + row).to(tl.int64) * width + col
        total = _add_positions(
            grad_ptr, nearest_ptr, gate_part_ptr, place, col < width, owner, value, channel, total, D
        )  # fmt: skip
    tl.store(tile_sum_ptr + tile.to(tl.int64) * D + channel, total, mask=channel < D)


@triton.jit(do_not_specialize=["images", "height", "width", "tiles_down", "tiles_across", "positions", "tokens"])
def _cell_sum_kernel(
    grad_ptr, h_ptr, detail_ptr, q_ptr, nearest_ptr, tile_owner_ptr, tile_sum_ptr, box_ptr, cu_ptr,
    cell_ptr, along_ptr, gate_part_ptr, grad_h_ptr,
    images, height, width, tiles_down, tiles_across, positions, tokens, h_stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    row_offset = token.to(tl.int64) * D
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = channel < D
    if token >= tl.load(cu_ptr + images):
        # A padding row has no cell, and its gradient is zero.
        if grad_h_ptr is not None:
            tl.store(grad_h_ptr + row_offset + channel, tl.zeros((BLOCK_D,), tl.float32), mask=inside)
        return
    box_ptr += token.to(tl.int64) * 4
    image = tl.load(box_ptr) // height
    top = image * height
    first_row, last_row = tl.load(box_ptr) - top, tl.load(box_ptr + 2) - top
    first_col, last_col = tl.load(box_ptr + 1), tl.load(box_ptr + 3)
    rows, cols = last_row - first_row + 1, last_col - first_col + 1
    value = _gate_row(h_ptr, detail_ptr, q_ptr, gate_part_ptr, token, channel, h_stride, D)
    if gate_part_ptr is not None:
        gate_part_ptr += tl.program_id(1).to(tl.int64) * positions
    total = tl.zeros((BLOCK_D,), tl.float32)
    lane = tl.arange(0, _TILE)
    # A step takes four positions: of a row of the tiles that the box touches or, where no tile fits into the box (as
    # with most cells), of a run through the box. One loop for both: another copy of its body would claim registers.
    by_tile = tl.minimum(rows, cols) >= _TILE
    top_tile, left_tile = first_row // _TILE, first_col // _TILE
    wide = last_col // _TILE - left_tile + 1
    steps = tl.where(by_tile, (last_row // _TILE - top_tile + 1) * wide * _TILE, tl.cdiv(rows * cols, _TILE))
    step = 0
    while step < steps:
        tile_row, tile_col = top_tile + step // _TILE // wide, left_tile + step // _TILE % wide
        tile = (image.to(tl.int64) * tiles_down + tile_row) * tiles_across + tile_col
        if tl.load(tile_owner_ptr + tile, mask=by_tile, other=-1) == token:
            total += tl.load(tile_sum_ptr + tile * D + channel, mask=inside, other=0.0)
            step += _TILE
        else:
            index = step * _TILE + lane
            row = tl.where(by_tile, tile_row * _TILE + step % _TILE, first_row + index // cols)
            col = tl.where(by_tile, tile_col * _TILE + lane, first_col + index % cols)
            place = (top + row).to(tl.int64) * width + col
            within = (row <= last_row) & (col <= last_col)
            total = _add_positions(
                grad_ptr, nearest_ptr, gate_part_ptr, place, within, token, value, channel, total, D
            )  # fmt: skip
            step += 1
    tl.store(cell_ptr + row_offset + channel, total, mask=inside)
    if along_ptr is not None:
        h = tl.load(h_ptr + token.to(tl.int64) * h_stride + channel, mask=inside, other=0.0).to(tl.float32)
        detail = tl.load(detail_ptr + row_offset + channel, mask=inside, other=0.0)
        tl.store(along_ptr + tl.program_id(1).to(tl.int64) * tokens + token, tl.sum(total * (h - detail), 0))


def plug_back_fwd(h: Tensor, detail: Tensor, survey: Survey, nearest: Tensor, residual: Tensor | None) -> Tensor:
    """(T, D) tokens, float32 ``h - s``, (S,) nearest packed_rows, (S, D) residual rows -> (S, D) in h's dtype.

    h' of the nearest token plus the residual, rounded once; h and residual have a unit last stride.
    """
    positions, d = nearest.shape[0], h.shape[1]
    out = launch.empty((positions, d), h.dtype, h.device)
    config = launch.config_for("plug_back_fwd", h.device, D=d)
    launch.launch(
        _plug_back_fwd_kernel, (cdiv(positions, config["ROWS"]), cdiv(d, config["BLOCK_D"])),
        h, detail, survey.confidence, nearest, residual, out, positions, h.stride(0),
        0 if residual is None else residual.stride(0), D=d, **config,
    )  # fmt: skip
    return out


def plug_back_bwd(
    grad: Tensor, h: Tensor, detail: Tensor, survey: Survey, nearest: Tensor, cu_seqlens: Tensor,
    grid: tuple[int, int], grad_h: Tensor | None, want_along: bool, want_gate: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradient of the rows h' from that of the grid.

    Args:
        grad: contiguous (S, D) gradient of the output.
        grad_h: (T, D); its padding rows are set to zero here.
        want_along: also ``<g_i, s_i>`` of every token, in parts.
        want_gate: also ``<g_l, h'_l>`` of every position, in parts.

    Returns:
        (T, D) float32 with padding rows unwritten, and the two in float32 (parts, T) and (parts, S), to be summed over
        parts; positions of an image without tokens stay unwritten.
    """
    height, width = grid
    (tokens, d), positions, device = h.shape, nearest.shape[0], h.device
    box = launch.empty((tokens, 4), torch.int32, device)
    config: dict[str, Any] = launch.config_for("plug_back_box", device)
    launch.launch(_box_start_kernel, (cdiv(tokens, config["BLOCK"]),), survey.row, survey.col, box, tokens, **config)
    launch.launch(_box_kernel, (cdiv(positions, config["BLOCK"]),), nearest, box, positions, width, **config)

    config = launch.config_for("plug_back_bwd", device, D=d)
    parts = cdiv(d, config["BLOCK_D"])
    images, cuts = cu_seqlens.shape[0] - 1, (cdiv(height, TILE), cdiv(width, TILE))
    tiles = images * cuts[0] * cuts[1]
    tile_owner, tile_sum = launch.empty((tiles,), torch.int32, device), launch.empty((tiles, d), torch.float32, device)
    cell = launch.empty((tokens, d), torch.float32, device)
    along = launch.empty((parts, tokens), torch.float32, device) if want_along else None
    gate_part = launch.empty((parts, positions), torch.float32, device) if want_gate else None
    inputs = grad, h, detail, survey.confidence, nearest
    launch.launch(
        _tile_sum_kernel, (tiles, parts), *inputs, tile_owner, tile_sum, gate_part,
        height, width, *cuts, positions, h.stride(0), D=d, **config,
    )  # fmt: skip
    launch.launch(
        _cell_sum_kernel, (tokens, parts), *inputs, tile_owner, tile_sum, box, cu_seqlens,
        cell, along, gate_part, grad_h, images, height, width, *cuts, positions, tokens, h.stride(0), D=d, **config,
    )  # fmt: skip
    return cell, along, gate_part
