"""Which segment (image or sequence) a packed row belongs to."""

import torch
from torch import Tensor

from dcdit.ops._torch import host_reads


def segment_of_rows(cu_seqlens: Tensor, total: int) -> Tensor:
    """(total,) int64: the segment of each packed row; B for padding rows, which lie past ``cu_seqlens[-1]``."""
    rows = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:], rows, right=True)


def may_have_padding(cu_seqlens: Tensor, total: int) -> bool:
    """False only where it is known that all ``total`` packed rows belong to a segment."""
    return not host_reads.reads_are_free(cu_seqlens) or int(cu_seqlens[-1]) < total
