"""Launches of the packing family, for the ahead-of-time check."""

import torch

from dcdit.kernels import packing


def launches(dtype: torch.dtype, width: int) -> None:
    x = torch.empty(6, width, dtype=dtype)
    indices, packed_rows = torch.empty(4, dtype=torch.int64), torch.empty(2, 3, dtype=torch.int32)
    packing.gather_fwd(x, indices, None)
    packing.gather_fwd(x, indices, torch.empty(3, width, dtype=torch.float32))
    packing.scatter_fwd(x[:4], packed_rows, 0.0)
    packing.bias_bwd(x[:4], packed_rows, torch.float32)
