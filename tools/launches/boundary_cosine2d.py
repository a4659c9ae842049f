"""Launches of the grid cosine boundary, for the ahead-of-time check."""

import torch

from dcdit.kernels import boundary_cosine2d


def launches(dtype: torch.dtype, width: int) -> None:
    q, k = torch.empty(2, 6, width, dtype=dtype)
    weight = torch.empty(9, width)
    p, stats = boundary_cosine2d.cosine2d_fwd(q, k, weight, 2, 3)
    boundary_cosine2d.cosine2d_bwd(p, q, k, weight, stats, 2, 3, True, True, True)
    boundary_cosine2d.cosine2d_bwd(p, q, k, weight, stats, 2, 3, True, True, False)
