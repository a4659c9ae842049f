"""De-chunking where each image has tokens outside of the grid: they go around it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dcdit.ops.autocast import without_autocast
from dcdit.ops.autograd import apply
from dcdit.ops.backend import backend_for
from dcdit.ops.numerics import widest
from dcdit.ops.token_selection import TokenSelection

DeChunk = Callable[[Tensor, TokenSelection, Tensor | None], Tensor]
"""From tokens (T, D), their selection and a residual (B, L, D) or None to (B, L, D)."""


def around_extra_tokens(dechunk: DeChunk, h: Tensor, sel: TokenSelection, residual: Tensor | None) -> Tensor:
    """De-chunk the grid alone, and put the extra tokens of each image before it: (B, n + L, D).

    Args:
        dechunk: of a grid without extra tokens.
        h: (T, D) packed tokens.
        sel: a selection with extra tokens.
        residual: (B, n + L, D).
    """
    grid, extra = sel.grid_selection, sel.extra_tokens
    assert grid is not None
    images, width = grid.mask.shape[0], h.shape[1]
    rows = backend_for(h).gather_tokens(h, _extra_tokens_first(sel, grid), None)
    outside, tokens = apply(_Split, rows, images * extra)
    outside = outside.view(images, extra, width)
    if residual is None:
        return torch.cat([outside, dechunk(tokens, grid, None)], 1)
    added = (outside + residual[:, :extra]).to(widest(h, residual))
    return torch.cat([added, dechunk(tokens, grid, residual[:, extra:])], 1)


class _Split(torch.autograd.Function):
    """``rows[:first], rows[first:]``. PyTorch's own split has a backward that autocast would change."""

    @staticmethod
    def forward(rows: Tensor, first: int) -> tuple[Tensor, Tensor]:
        return rows[:first], rows[first:]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, Tensor]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_of_rest: Tensor) -> tuple[Tensor, None]:
        with without_autocast(grad):
            return torch.cat([grad, grad_of_rest]), None


def _extra_tokens_first(sel: TokenSelection, grid: TokenSelection) -> TokenSelection:
    """An order of the packed rows, as a selection of all of them: extra tokens first, then what ``grid`` packs."""
    (images, length), extra, device = grid.mask.shape, sel.extra_tokens, sel.indices.device
    row = torch.arange(sel.indices.shape[0], device=device)
    image = sel.indices.div(extra + length, rounding_mode="floor")
    column = sel.indices - image * (extra + length)
    place = torch.where(column < extra, image * extra + column, row + (images - image - 1) * extra)
    image = grid.indices.div(max(length, 1), rounding_mode="floor")
    grid_rows = torch.where(grid.indices < 0, -1, row[: grid.indices.shape[0]] + (image + 1) * extra)
    extra_rows = sel.cu_seqlens[:-1, None] + row[:extra]
    return sel._replace(
        indices=torch.cat([extra_rows.flatten(), grid_rows]),
        packed_rows=torch.where(sel.indices < 0, -1, place).to(torch.int32),
        mask=sel.indices >= 0,
        source_cu_seqlens=sel.cu_seqlens,
        grid_selection=None,
    )
