"""Launches of the packing family, for the ahead-of-time check."""

import torch

from dcdit.kernels import pack


def launches(dtype: torch.dtype, width: int) -> None:
    x = torch.empty(6, width, dtype=dtype)
    indices, slots = torch.empty(4, dtype=torch.int64), torch.empty(2, 3, dtype=torch.int32)
    pack.gather_fwd(x, indices, None)
    pack.gather_fwd(x, indices, torch.empty(3, width, dtype=torch.float32))
    pack.scatter_fwd(x[:4], slots, 0.0)
    pack.bias_bwd(x[:4], slots, torch.float32)
