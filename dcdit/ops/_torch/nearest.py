"""Nearest kept position on a grid: exact Euclidean distance, ties to the lowest raster index, two passes."""

import torch
from torch import Tensor

from dcdit.ops._torch.rows import as_custom_op, reads_are_free

FAR = torch.iinfo(torch.int64).max // 2


def _nearest_fake(kept: Tensor) -> Tensor:
    return torch.empty_like(kept, dtype=torch.int64)


@as_custom_op(_nearest_fake)
def nearest_kept(kept: Tensor) -> Tensor:
    """(B, H, W) bool -> (B, H, W) int64: raster index of the nearest kept position, -1 in an image that keeps none.

    The key ``distance^2 * L + index`` orders by distance, then by index, so its minimum settles ties. The first pass
    finds the key along each row by running maxima, the second takes the minimum over growing row offsets; once an
    offset alone exceeds every distance found, the rest cannot win.
    """
    _, height, width = kept.shape
    length = height * width
    key = _nearest_in_row(kept)
    best = key.clone()
    for step in range(1, height):
        offset = step * step * length
        if reads_are_free(kept) and not bool((best >= offset).any()):
            break
        below, above = best[:, step:], best[:, :-step]
        torch.minimum(below, key[:, :-step] + offset, out=below)
        torch.minimum(above, key[:, step:] + offset, out=above)
    return torch.where(best < FAR, best % length, -1)


def _nearest_in_row(kept: Tensor) -> Tensor:
    """Key of the nearest kept position of the same row, ``FAR`` in a row without one."""
    _, height, width = kept.shape
    column = torch.arange(width, device=kept.device)
    absent = 2 * width
    left = torch.where(kept, column, -absent).cummax(2).values
    right = torch.where(kept, column, absent).flip(2).cummin(2).values.flip(2)
    # Equal distances go left, which is the lower raster index.
    apart = torch.minimum(column - left, right - column)
    owner = torch.where(column - left == apart, left, right)
    row_start = torch.arange(height, device=kept.device)[:, None] * width
    return torch.where(apart < width, apart * apart * (height * width) + row_start + owner, FAR)
