"""Launches of the sequence cosine boundary, for the ahead-of-time check."""

import torch

from dcdit.kernels import boundary_cosine


def launches(dtype: torch.dtype, width: int) -> None:
    q, k = torch.empty(2, 6, width, dtype=dtype)
    for cu_seqlens in (None, torch.empty(3, dtype=torch.int32)):
        p = boundary_cosine.cosine_fwd(q, k, cu_seqlens, 3)
        boundary_cosine.cosine_bwd(p, q, k, cu_seqlens, 3, True, True)
