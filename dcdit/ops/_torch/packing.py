"""Gather and scatter of rows. Each is the gradient of the other."""

from typing import Any

import torch
from torch import Tensor

from dcdit.ops._torch import host_reads
from dcdit.ops.autograd import apply
from dcdit.ops.numerics import upcast_all
from dcdit.ops.sizes import known_true
from dcdit.ops.token_selection import TokenSelection


def gather_tokens(x: Tensor, sel: TokenSelection, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    shared = rows.shape[0] != sel.packed_rows.numel()  # one table for several images, or for none
    tokens = _take_shared(x[0], sel) if shared else apply(_TakeRows, rows, sel.indices, sel.packed_rows.flatten())
    if bias is None:
        return tokens
    tokens, bias = upcast_all(tokens, bias)
    return (tokens + _take_shared(bias, sel)).to(x.dtype)


def scatter_tokens(t: Tensor, sel: TokenSelection, fill: float) -> Tensor:
    rows = apply(_PutRows, t, sel.indices, sel.packed_rows.flatten(), fill)
    return rows.view(*sel.mask.shape, t.shape[-1])


def _take_shared(table: Tensor, sel: TokenSelection) -> Tensor:
    """(T, D): the row of the position of each token in a table (L, D) that all images share."""
    position = torch.where(sel.indices < 0, -1, sel.indices % max(table.shape[0], 1))
    return apply(_TakeShared, table, position, sel.indices, sel.packed_rows.flatten(), sel.mask.shape[0])


def take_rows(source: Tensor, indices: Tensor, fill: float = 0.0) -> Tensor:
    """Rows of ``source`` (n, D) at ``indices`` (m,): (m, D), ``fill`` where the index is negative."""
    if known_true(source.shape[0] == 0):
        return source.new_full((indices.shape[0], source.shape[1]), fill)
    rows = source.index_select(0, indices.clamp(min=0))
    absent = indices < 0
    if host_reads.reads_are_free(source) and not absent.any():
        return rows
    if torch.compiler.is_compiling():
        # torch 2.11 traces wrong gradients for the in-place fill (PyTorch issue 180642).
        return rows.masked_fill(absent[:, None], fill)
    return rows.masked_fill_(absent[:, None], fill)


def put_rows(rows: Tensor, indices: Tensor, inverse: Tensor, fill: float) -> Tensor:
    """(n, D): each of the rows (m, D) at its index, ``fill`` elsewhere. A negative index drops its row.

    ``inverse`` (n,) says the same the other way round: which row comes to each place, negative where none does.
    """
    if not host_reads.reads_are_free(rows):
        return take_rows(rows, inverse, fill)
    kept = indices >= 0
    if not kept.all():
        rows, indices = rows[kept], indices[kept]
    return rows.new_full((inverse.shape[0], rows.shape[1]), fill).index_put_((indices,), rows)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(source: Tensor, indices: Tensor, inverse: Tensor) -> Tensor:
        return take_rows(source, indices)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return apply(_PutRows, grad, *ctx.saved_tensors, 0.0), None, None


class _PutRows(torch.autograd.Function):
    @staticmethod
    def forward(rows: Tensor, indices: Tensor, inverse: Tensor, fill: float) -> Tensor:
        return put_rows(rows, indices, inverse, fill)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return apply(_TakeRows, grad, *ctx.saved_tensors), None, None, None


class _TakeShared(torch.autograd.Function):
    """Rows of a table (L, D) that all images share. Its gradient sums over the images in a fixed order."""

    @staticmethod
    def forward(table: Tensor, position: Tensor, indices: Tensor, inverse: Tensor, images: int) -> Tensor:
        return take_rows(table, position)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        table, _, indices, inverse, images = inputs
        ctx.shape = (images, *table.shape)
        ctx.save_for_backward(indices, inverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        per_image = apply(_PutRows, grad, *ctx.saved_tensors, 0.0).view(ctx.shape)
        return per_image.sum(0), None, None, None, None
