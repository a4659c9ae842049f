"""Where the kept tokens of a grid are, and which of them is nearest to every position.

One pass over the grid rows writes ``rank``, the packed row at which a column would be inserted: the kept tokens of any
piece of a grid row are then ``rank[left]`` to ``rank[right]``, and the two next to a column are ``rank`` and the one
before it. A second pass walks outwards over grid rows and stops once a row is farther away than everything found, so a
position costs as many rows as its token is away: at most the height of the grid, whatever the mask.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcdit.kernels import launch
from dcdit.kernels.numerics import PROB_EPS, cdiv

launch.set_default_configs("survey", {"LINES": 4, "BLOCK": 64, "num_warps": 2})
launch.set_default_configs("nearest", {"BLOCK": 128, "num_warps": 4})

_PROB_EPS = tl.constexpr(PROB_EPS)
_FAR = tl.constexpr(2**31 - 1)

MAX_SIDE = 32767
"""Squared distances are int32."""


class Survey(NamedTuple):
    """What the kernels look up. Entries of padding tokens are unwritten, and never read."""

    rank: Tensor
    """(B * H, W + 1) int32: packed row of the first kept token of the grid row at or right of a column."""
    row: Tensor
    """(T,) int32: row in the stacked grids of the batch, ``image * H + r``."""
    col: Tensor
    """(T,) int32"""
    confidence: Tensor
    """(T,) float32: q = clamp(p, 1e-4, 1 - 1e-4)."""


@triton.jit(do_not_specialize=["lines", "width"])
def _survey_kernel(
    slot_ptr, p_ptr, rank_ptr, row_ptr, col_ptr, q_ptr, lines, width, LINES: tl.constexpr, BLOCK: tl.constexpr
):
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    real = line < lines
    start_of_line = line.to(tl.int64) * width
    rank_ptr += line.to(tl.int64) * (width + 1)
    rank = tl.full((LINES,), _FAR, tl.int32)
    for start in range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK)
        inside = real[:, None] & (col < width)[None, :]
        slot = tl.load(slot_ptr + start_of_line[:, None] + col[None, :], mask=inside, other=-1)
        rank = tl.minimum(rank, tl.min(tl.where(slot >= 0, slot, _FAR), 1))
    # Kept tokens of a row have consecutive packed_rows, so from here on counting is enough.
    for start in range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK)
        inside = real[:, None] & (col < width)[None, :]
        slot = tl.load(slot_ptr + start_of_line[:, None] + col[None, :], mask=inside, other=-1)
        kept = slot >= 0
        count = kept.to(tl.int32)
        before = tl.cumsum(count, 1) - count
        tl.store(rank_ptr[:, None] + col[None, :], rank[:, None] + before, mask=inside)
        rank += tl.sum(count, 1)
        p = tl.load(p_ptr + start_of_line[:, None] + col[None, :], mask=kept, other=0.0).to(tl.float32)
        tl.store(row_ptr + slot, tl.broadcast_to(line[:, None], (LINES, BLOCK)), mask=kept)
        tl.store(col_ptr + slot, tl.broadcast_to(col[None, :], (LINES, BLOCK)), mask=kept)
        tl.store(q_ptr + slot, tl.minimum(tl.maximum(p, _PROB_EPS), 1 - _PROB_EPS), mask=kept)
    tl.store(rank_ptr + width, rank, mask=real)


@triton.jit(do_not_specialize=["positions", "height", "width"])
def _nearest_kernel(rank_ptr, col_ptr, nearest_ptr, positions, height, width, BLOCK: tl.constexpr):
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = position < positions
    row, col = (position // width).to(tl.int32), (position % width).to(tl.int32)
    top = row // height * height
    best = tl.where(inside, _FAR, -1)
    best_slot = tl.full((BLOCK,), -1, tl.int32)
    step = 0
    while (step < height) & (step * step <= tl.max(best, 0)):
        for side in tl.static_range(2):
            line = row + (2 * side - 1) * step
            exists = inside & (line >= top) & (line < top + height)
            line_ptr = rank_ptr + line.to(tl.int64) * (width + 1)
            first = tl.load(line_ptr, mask=exists, other=0)
            end = tl.load(line_ptr + width, mask=exists, other=0)
            right = tl.load(line_ptr + col, mask=exists, other=0)
            for back in tl.static_range(2):
                slot = right - back
                valid = (slot >= first) & (slot < end)
                away = tl.load(col_ptr + slot, mask=valid, other=0) - col
                distance = away * away + step * step
                # Slots order like raster indices.
                wins = valid & ((distance < best) | ((distance == best) & (slot < best_slot)))
                best = tl.where(wins, distance, best)
                best_slot = tl.where(wins, slot, best_slot)
        step += 1
    tl.store(nearest_ptr + position, best_slot, mask=inside)


def survey_fwd(packed_rows: Tensor, p: Tensor, grid: tuple[int, int], tokens: int) -> Survey:
    """Contiguous (B, L) int32 packed_rows (-1: not kept) and (B, L) probabilities, number of packed rows T -> Survey.

    Raises:
        ValueError: a side of the grid is too long for int32 squared distances.
    """
    height, width = grid
    if max(grid) > MAX_SIDE:
        raise ValueError(f"grid is {tuple(grid)}; the Triton backend accepts sides up to {MAX_SIDE}")
    lines, device = packed_rows.shape[0] * height, packed_rows.device
    survey = Survey(
        rank=launch.empty((lines, width + 1), torch.int32, device),
        row=launch.empty((tokens,), torch.int32, device),
        col=launch.empty((tokens,), torch.int32, device),
        confidence=launch.empty((tokens,), torch.float32, device),
    )
    config = launch.config_for("survey", device)
    launch.launch(_survey_kernel, (cdiv(lines, config["LINES"]),), packed_rows, p, *survey, lines, width, **config)
    return survey


def nearest_fwd(survey: Survey, grid: tuple[int, int]) -> Tensor:
    """Survey of B grids -> (B * L,) int32: packed row of the nearest kept token, -1 in an image that keeps none.

    Exact; equal distances go to the lowest raster index.
    """
    height, width = grid
    positions, device = survey.rank.shape[0] * width, survey.rank.device
    nearest = launch.empty((positions,), torch.int32, device)
    config = launch.config_for("nearest", device)
    launch.launch(
        _nearest_kernel, (cdiv(positions, config["BLOCK"]),), survey.rank, survey.col, nearest,
        positions, height, width, **config,
    )  # fmt: skip
    return nearest
