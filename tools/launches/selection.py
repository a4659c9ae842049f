"""Launches of token selection, for the ahead-of-time check."""

import torch

from dcdit.kernels import selection


def launches(dtype: torch.dtype, width: int) -> None:
    grid, packed = torch.empty(3, 8, dtype=dtype), torch.empty(24, dtype=dtype)
    starts = torch.empty(4, dtype=torch.int32)
    selection.select_fwd(grid, None, 0.5, 0.2, None, None, None)
    selection.select_fwd(grid, None, 0.5, 0.0, torch.empty(3), None, None)
    selection.select_fwd(grid, None, 0.5, 0.2, None, None, 16)
    selection.select_fwd(grid, None, 0.5, 0.0, None, 4, None)
    selection.select_fwd(packed, starts, 0.5, 0.2, None, None, None)
    selection.select_fwd(packed, starts, 0.5, 0.2, None, None, 16)
