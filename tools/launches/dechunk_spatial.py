"""Launches of the spatial de-chunking family, for the ahead-of-time check."""

import torch

from dcdit.kernels import dechunk_spatial as kernels


def launches(dtype: torch.dtype, width: int) -> None:
    h, residual = torch.empty(4, width, dtype=dtype), torch.empty(6, width, dtype=dtype)
    p, packed_rows, cu_seqlens = (
        torch.empty(1, 6),
        torch.empty(1, 6, dtype=torch.int32),
        torch.empty(2, dtype=torch.int32),
    )
    geometry = kernels.Geometry(packed_rows, cu_seqlens, (2, 3), sigma=1.0, radius=6)
    for given in (None, residual):
        _, saved = kernels.dechunk_spatial_fwd(h, p, given, geometry)
    for want_h, want_p, gate_dtype in (
        (True, True, torch.float32),
        (True, False, None),
        (False, True, torch.float32),
        (False, False, torch.float32),
    ):
        kernels.dechunk_spatial_bwd(residual, h, p, geometry, saved, want_h, want_p, gate_dtype)
