"""Gather and scatter of rows. Each is the gradient of the other."""

from typing import Any

import torch
from torch import Tensor

from dcdit.ops._torch import host_reads
from dcdit.ops.autograd import apply
from dcdit.ops.numerics import upcast_all
from dcdit.ops.token_selection import TokenSelection


def gather_tokens(x: Tensor, sel: TokenSelection, bias: Tensor | None) -> Tensor:
    packed_rows = sel.packed_rows.flatten()
    tokens = apply(_TakeRows, x.reshape(-1, x.shape[-1]), sel.indices, packed_rows, 0.0)
    if bias is None:
        return tokens
    position = torch.where(sel.indices < 0, -1, sel.indices % max(bias.shape[0], 1))
    tokens, bias = upcast_all(tokens, bias)
    return (tokens + apply(_TakeShared, bias, position, sel.indices, packed_rows, sel.mask.shape[0])).to(x.dtype)


def scatter_tokens(t: Tensor, sel: TokenSelection, fill: float) -> Tensor:
    rows = apply(_TakeRows, t, sel.packed_rows.flatten(), sel.indices, fill)
    return rows.view(*sel.mask.shape, t.shape[-1])


def take_rows(source: Tensor, indices: Tensor, fill: float = 0.0) -> Tensor:
    """Rows of ``source`` (n, D) at ``indices`` (m,): (m, D), ``fill`` where the index is negative."""
    if source.shape[0] == 0:
        return source.new_full((indices.shape[0], source.shape[1]), fill)
    rows = source.index_select(0, indices.clamp(min=0))
    absent = indices < 0
    if host_reads.reads_are_free(source) and not absent.any():
        return rows
    if torch.compiler.is_compiling():
        # torch 2.11 traces wrong gradients for the in-place fill (PyTorch issue 180642).
        return rows.masked_fill(absent[:, None], fill)
    return rows.masked_fill_(absent[:, None], fill)


class _TakeRows(torch.autograd.Function):
    """:func:`take_rows` of distinct indices, and the inverse map: which of the taken rows each source row went to."""

    @staticmethod
    def forward(source: Tensor, indices: Tensor, inverse: Tensor, fill: float) -> Tensor:
        return take_rows(source, indices, fill)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, indices, inverse, _ = inputs
        ctx.save_for_backward(indices, inverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        indices, inverse = ctx.saved_tensors
        return apply(_TakeRows, grad, inverse, indices, 0.0), None, None, None


class _TakeShared(torch.autograd.Function):
    """Rows of a table (L, D) that all images share. Its gradient sums over the images in a fixed order."""

    @staticmethod
    def forward(table: Tensor, position: Tensor, indices: Tensor, packed_rows: Tensor, images: int) -> Tensor:
        return take_rows(table, position)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        table, _, indices, packed_rows, images = inputs
        ctx.shape = (images, *table.shape)
        ctx.save_for_backward(indices, packed_rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        indices, packed_rows = ctx.saved_tensors
        per_image = apply(_TakeRows, grad, packed_rows, indices, 0.0).view(ctx.shape)
        return per_image.sum(0), None, None, None, None
