"""Nearest kept position on a grid: exact Euclidean distance, ties to the lowest raster index, two passes."""

import torch
from torch import Tensor


def nearest_kept(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, L) int64: raster index of the kept position nearest to each position.

    The key ``distance^2 * L + index`` orders by distance, then by index, so its minimum settles ties.
    """
    height, width = grid
    length = height * width
    far = torch.iinfo(torch.int64).max // 2
    kept = mask.view(-1, height, width)
    column = torch.arange(width, device=mask.device)
    left = torch.where(kept, column, -far).cummax(2).values
    right = torch.where(kept, column, far).flip(2).cummin(2).values.flip(2)
    nearer_right = right - column < column - left
    owner = torch.where(nearer_right, right, left)
    apart = (owner - column) ** 2
    row = torch.arange(height, device=mask.device)[:, None]
    key = torch.where(kept.any(2, keepdim=True), apart * length + row * width + owner, far)
    best = key.clone()
    for step in range(1, height):
        offset = step * step * length
        best[:, step:] = torch.minimum(best[:, step:], key[:, :-step] + offset)
        best[:, :-step] = torch.minimum(best[:, :-step], key[:, step:] + offset)
    return (best % length).view(mask.shape)
