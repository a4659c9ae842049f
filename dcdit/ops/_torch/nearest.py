"""The nearest kept position on a grid, in two passes: exact Euclidean distance, ties to the lowest raster index."""

import torch
from torch import Tensor

from dcdit.ops._torch import host_reads
from dcdit.ops._torch.custom_op import as_custom_op

FAR = torch.iinfo(torch.int64).max // 2
"""A key above that of every kept position; row offsets may still be added to it."""


def _nearest_fake(kept: Tensor) -> Tensor:
    return kept.new_empty(kept.shape, dtype=torch.int64)


@as_custom_op(_nearest_fake)
def nearest_kept(kept: Tensor) -> Tensor:
    """(B, H, W) bool -> (B, H, W) int64: raster index of the nearest kept position, -1 in an image that keeps none.

    The key ``distance^2 * L + index`` orders by distance, then by index, so its minimum settles ties. The first pass
    finds the smallest key within each row, by running maxima. The second pass takes the minimum over the rows below and
    above, nearest rows first. It stops when the distance between rows alone exceeds every distance found.
    """
    _, height, width = kept.shape
    length = height * width
    key = _nearest_in_row(kept)
    best = key.clone()
    for step in range(1, height):
        offset = step * step * length
        if host_reads.reads_are_free(kept) and not bool((best >= offset).any()):
            break
        below, above = best[:, step:], best[:, :-step]
        torch.minimum(below, key[:, :-step] + offset, out=below)
        torch.minimum(above, key[:, step:] + offset, out=above)
    return torch.where(best < FAR, best % length, -1)


def _nearest_in_row(kept: Tensor) -> Tensor:
    """(B, H, W) int64: key of the nearest kept position in the same row, ``FAR`` where the row keeps none."""
    _, height, width = kept.shape
    column = torch.arange(width, device=kept.device)
    absent = 2 * width
    left = torch.where(kept, column, -absent).cummax(2).values
    right = torch.where(kept, column, absent).flip(2).cummin(2).values.flip(2)
    # Of two equal distances the left one wins: it has the lower raster index.
    distance = torch.minimum(column - left, right - column)
    nearest = torch.where(column - left == distance, left, right)
    row_start = torch.arange(height, device=kept.device)[:, None] * width
    return torch.where(distance < width, distance * distance * (height * width) + row_start + nearest, FAR)
