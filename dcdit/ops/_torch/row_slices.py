"""Slices of rows that are worked through one after another, so that temporaries stay small beside the result."""

from torch import Tensor

SLICE_ELEMENTS = 1 << 18
"""Numbers in a slice, about."""
SLICE_ROWS = 1024
"""A slice has at least this many rows: its work must outweigh its calls."""


def rows_per_slice(width: int) -> int:
    """Rows in a slice of a tensor (n, width)."""
    return max(SLICE_ROWS, SLICE_ELEMENTS // max(1, width))


def row_slices(x: Tensor) -> list[slice]:
    """Slices that cover the rows of x (n, width)."""
    size = rows_per_slice(x.shape[1])
    return [slice(lo, lo + size) for lo in range(0, x.shape[0], size)]
