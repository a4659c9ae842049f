"""Launches of the spatial de-chunking family, for the ahead-of-time check."""

import torch

from dcdit.kernels import dechunk_spatial as kernels


def launches(dtype: torch.dtype, width: int) -> None:
    grid, tokens = (2, 3), 4
    h, residual = torch.empty(tokens, width, dtype=dtype), torch.empty(6, width, dtype=dtype)
    p, slots, cu_seqlens = torch.empty(1, 6), torch.empty(1, 6, dtype=torch.int32), torch.empty(2, dtype=torch.int32)
    for radius, sigma in ((6, 1.0), (12, 2.0)):
        for given in (residual, None):
            _, saved = kernels.dechunk_spatial_fwd(h, p, slots, given, grid, sigma, radius)
        gate = torch.float32
        for want_h, want_p, gate_dtype in ((1, 1, gate), (1, 0, None), (0, 1, gate), (0, 0, gate)):
            kernels.dechunk_spatial_bwd(
                residual, h, p, slots, cu_seqlens, saved, grid, sigma, radius, bool(want_h), bool(want_p), gate_dtype
            )
