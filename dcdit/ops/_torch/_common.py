"""Helpers shared by the operations of this backend."""

import torch
from torch import Tensor

PROB_EPS = 1e-4
ROW_EPS = 1e-8


def wide(x: Tensor) -> Tensor:
    """The accumulation dtype: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def segment_of_rows(cu_seqlens: Tensor, total: int) -> Tensor:
    """(total,) int64: the segment each packed row belongs to; rows past ``cu_seqlens[-1]`` get B."""
    rows = torch.arange(total, device=cu_seqlens.device, dtype=torch.int32)
    return torch.searchsorted(cu_seqlens[1:], rows, right=True)
