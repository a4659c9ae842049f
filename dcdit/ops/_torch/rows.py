"""Helpers shared by the operations of this backend."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 18
CHUNK_ROWS = 1024
"""Rows are worked through in chunks of about so many numbers, but not fewer rows: temporaries stay small beside the
result, and the calls per chunk small beside its work."""


def reads_are_free(x: Tensor) -> bool:
    """True where reading a number on the host costs neither a device sync nor a graph break."""
    return not x.is_cuda and not torch.compiler.is_compiling()


def may_have_padding(cu_seqlens: Tensor, total: int) -> bool:
    """False only where it is known that all ``total`` packed rows belong to a segment."""
    return not reads_are_free(cu_seqlens) or int(cu_seqlens[-1]) < total


def segment_of_rows(cu_seqlens: Tensor, total: int) -> Tensor:
    """(total,) int64: the segment each packed row belongs to; rows past ``cu_seqlens[-1]`` get B."""
    rows = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:], rows, right=True)


def chunk_rows(width: int) -> int:
    """Rows of a chunk of (n, width)."""
    return max(CHUNK_ROWS, CHUNK_ELEMENTS // max(1, width))


def chunks(x: Tensor) -> list[slice]:
    """Slices that cover the rows of x (n, width)."""
    size = chunk_rows(x.shape[1])
    return [slice(lo, lo + size) for lo in range(0, x.shape[0], size)]


def as_custom_op(fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function one operator under ``torch.compile``; a plain call otherwise.

    For functions that loop over chunks or leave a loop early: traced, they would unroll or break the graph.
    """

    def decorate(fn: Callable[..., Any]) -> Callable[..., Any]:
        op = torch.library.custom_op(f"dcdit_torch::{fn.__name__.lstrip('_')}", fn, mutates_args=())
        op.register_fake(fake)

        def call(*args: Any) -> Any:
            return op(*args) if torch.compiler.is_compiling() else fn(*args)

        return call

    return decorate
