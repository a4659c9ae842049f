"""Gather and scatter of rows. Each is the gradient of the other."""

from typing import Any

import torch
from torch import Tensor

from dcdit.ops._torch import host_reads
from dcdit.ops.numerics import upcast
from dcdit.ops.token_selection import TokenSelection


def gather_tokens(x: Tensor, sel: TokenSelection, bias: Tensor | None) -> Tensor:
    tokens = _GatherRows.apply(x.reshape(-1, x.shape[-1]), sel.indices)
    if bias is None:
        return tokens
    padding = sel.indices < 0
    position = torch.where(padding, -1, sel.indices % bias.shape[0])
    return (upcast(tokens) + _GatherShared.apply(upcast(bias), position, sel.indices, sel.mask.shape[0])).to(x.dtype)


def scatter_tokens(t: Tensor, sel: TokenSelection, fill: float) -> Tensor:
    rows = _ScatterRows.apply(t, sel.indices, sel.mask.numel(), fill)
    return rows.view(*sel.mask.shape, t.shape[-1])


def take_rows(source: Tensor, indices: Tensor) -> Tensor:
    """Rows of ``source`` (n, D) at ``indices`` (m,): (m, D), zeros where the index is negative."""
    if source.shape[0] == 0:
        return source.new_zeros(indices.shape[0], source.shape[1])
    rows = source.index_select(0, indices.clamp(min=0))
    absent = indices < 0
    if host_reads.reads_are_free(source) and not absent.any():
        return rows
    if torch.compiler.is_compiling():
        # torch 2.11 traces wrong gradients for the in-place fill (PyTorch issue 180642).
        return rows.masked_fill(absent[:, None], 0)
    return rows.masked_fill_(absent[:, None], 0)


def put_rows(rows: Tensor, indices: Tensor, total: int, fill: float = 0.0) -> Tensor:
    """(total, D): each row at its index, ``fill`` elsewhere. Indices are distinct; negative ones drop their row."""
    out = rows.new_full((total + 1, rows.shape[1]), fill)
    out.index_put_((torch.where(indices < 0, total, indices),), rows)
    return out[:total]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.total = source.shape[0]
        return take_rows(source, indices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        return _ScatterRows.apply(grad, indices, ctx.total, 0.0), None


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, indices: Tensor, total: int, fill: float) -> Tensor:
        ctx.save_for_backward(indices)
        return put_rows(rows, indices, total, fill)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (indices,) = ctx.saved_tensors
        return _GatherRows.apply(grad, indices), None, None, None


class _GatherShared(torch.autograd.Function):
    """Rows of a table (L, D) that all images share. Its gradient sums over the images in a fixed order."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, position: Tensor, indices: Tensor, images: int) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.shape = (images, *table.shape)
        return take_rows(table, position)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (indices,) = ctx.saved_tensors
        images, length, width = ctx.shape
        return put_rows(grad, indices, images * length).view(images, length, width).sum(0), None, None, None
