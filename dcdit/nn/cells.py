"""Cells of 4 x 4 positions: their means, and back. Those at the end of a grid may be smaller."""

import torch.nn.functional as F
from einops import repeat
from torch import Tensor

from dcdit.nn.memory_format import to_grid

SIDE = 4
"""Positions per side of a cell."""


def cells_of(grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the cells of a grid (H, W)."""
    return -(-grid[0] // SIDE), -(-grid[1] // SIDE)


def cell_means(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, H*W, D) -> (B, D, h, w): the mean of each cell."""
    return F.avg_pool2d(to_grid(x, grid), SIDE, ceil_mode=True)


def spread(of_cells: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, h*w, ...) -> (B, H*W, ...): each position gets what its cell has. Its gradient is a sum in a fixed order."""
    rows, _ = cells_of(grid)
    wide = repeat(of_cells, "b (h w) ... -> b (h i) (w j) ...", h=rows, i=SIDE, j=SIDE)
    return wide[:, : grid[0], : grid[1]].flatten(1, 2)
