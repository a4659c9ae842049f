"""Chunking to packed tokens, and de-chunking back to the grid in float32, also under autocast."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dcdit import ops
from dcdit.nn.cells import cell_means, spread
from dcdit.nn.memory_format import to_tokens
from dcdit.nn.stages import stage
from dcdit.ops import TokenSelection
from dcdit.ops.selection import start_selection
from dcdit.ops.token_selection import PendingSelection


class ChunkLayer(nn.Module):
    """Selects the tokens to keep and packs them (DC-DiT, arXiv 2603.06351, routing).

    Example:
        >>> import torch
        >>> from dcdit.nn import ChunkLayer
        >>> x, p = torch.arange(4.0).view(1, 4, 1), torch.tensor([[0.9, 0.1, 0.8, 0.2]])
        >>> tokens, sel = ChunkLayer()(x, p, position=torch.full((4, 1), 10.0))
        >>> tokens.tolist(), sel.indices.tolist()
        ([[10.0], [12.0]], [0, 2])
    """

    def forward(
        self,
        x: Tensor,
        p: Tensor,
        position: Tensor | None = None,
        drop_fraction: float | Tensor = 0.0,
        budget: int | None = None,
        capacity: int | None = None,
        max_seqlen: int | None = None,
        meanwhile: Callable[[], object] | None = None,
    ) -> tuple[Tensor, TokenSelection]:
        """(B, L, D), probabilities (B, L), position (L, D) -> packed tokens (T, D) and their selection.

        ``drop_fraction`` to ``max_seqlen`` are those of :func:`dcdit.ops.select_tokens`. ``meanwhile`` is called before
        the number of kept tokens is waited for: what it starts keeps the device busy.
        """
        pending = self.start(p, drop_fraction, budget, capacity, max_seqlen)
        if meanwhile is not None:
            meanwhile()
        sel = pending.wait()
        return self.pack(x, sel, position), sel

    def start(
        self,
        p: Tensor,
        drop_fraction: float | Tensor = 0.0,
        budget: int | None = None,
        capacity: int | None = None,
        max_seqlen: int | None = None,
    ) -> PendingSelection:
        """The selection alone, whose size need not be known yet."""
        with stage("select"):
            return start_selection(
                p, drop_fraction=drop_fraction, budget=budget, capacity=capacity, max_seqlen=max_seqlen
            )

    def pack(self, x: Tensor, sel: TokenSelection, position: Tensor | None = None) -> Tensor:
        """The kept tokens (T, D) of x (B, L, D), with their position added."""
        with stage("gather"):
            return ops.gather_tokens(x, sel, position)


class ContextChunkLayer(ChunkLayer):
    """Adds to each kept token what a linear layer makes of the mean of its cell of 4 x 4 positions.

    Without it, the transformer sees of a dropped position only what the encoder's convolutions carried to a kept one.

    Args:
        dim: D.
        grid: (H, W). Cells at its end may be smaller.

    Example:
        >>> import torch
        >>> from dcdit.nn import ContextChunkLayer
        >>> chunk = ContextChunkLayer(1, grid=(1, 6))
        >>> _ = torch.nn.init.ones_(chunk.proj.weight)
        >>> x = torch.tensor([1.0, 9.0, 2.0, 4.0, 5.0, 7.0]).view(1, 6, 1)
        >>> p = torch.tensor([[0.9, 0.1, 0.8, 0.2, 0.2, 0.8]])
        >>> tokens, _ = chunk(x, p)
        >>> tokens.flatten().tolist()  # 1 and 2 in a cell with the mean 4; 7 in one with the mean 6
        [5.0, 6.0, 13.0]
    """

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.proj = nn.Linear(dim, dim, bias=False)

    def pack(self, x: Tensor, sel: TokenSelection, position: Tensor | None = None) -> Tensor:
        with stage("gather"):
            x = x + spread(self.proj(to_tokens(cell_means(x, self.grid))), self.grid)
        return super().pack(x, sel, position)


class SpatialDeChunk(nn.Module):
    """Gaussian smoothing and nearest-token plug-back (DC-DiT, arXiv 2603.06351, de-chunking).

    Args:
        grid: (H, W).
        sigma: of the smoothing, in grid cells.

    Example:
        >>> import torch
        >>> from dcdit.nn import ChunkLayer, SpatialDeChunk
        >>> x, p = torch.tensor([[[1.0], [9.0], [9.0], [5.0]]]), torch.tensor([[0.9, 0.1, 0.1, 0.9]])
        >>> tokens, sel = ChunkLayer()(x, p)  # 1 and 5
        >>> SpatialDeChunk((1, 4), sigma=0.5)(tokens, p, sel, residual=torch.zeros(1, 4, 1)).squeeze()  # the nearest
        tensor([1., 1., 5., 5.])
    """

    def __init__(self, grid: tuple[int, int], sigma: float) -> None:
        super().__init__()
        self.grid = grid
        self.sigma = sigma

    def forward(self, h: Tensor, p: Tensor, sel: TokenSelection, residual: Tensor) -> Tensor:
        """Packed tokens (T, D), probabilities (B, L), residual (B, L, D) -> (B, L, D)."""
        return ops.dechunk_spatial(h, p, sel, self.grid, self.sigma, ste_coefficient(p), residual)


class EMADeChunk(nn.Module):
    """Exponential moving average in raster order (H-Net, arXiv 2507.07955, section 2.2).

    Example:
        >>> import torch
        >>> from dcdit.nn import ChunkLayer, EMADeChunk
        >>> x, p = torch.tensor([[[1.0], [9.0], [5.0], [9.0]]]), torch.tensor([[1.0, 0.2, 0.75, 0.1]])
        >>> tokens, sel = ChunkLayer()(x, p)  # 1 and 5
        >>> EMADeChunk()(tokens, p, sel, residual=torch.zeros(1, 4, 1)).squeeze()  # 4 = 0.75 * 5 + 0.25 * 1
        tensor([0.9999, 0.9999, 4.0000, 4.0000])
    """

    def forward(self, h: Tensor, p: Tensor, sel: TokenSelection, residual: Tensor) -> Tensor:
        """Packed tokens (T, D), probabilities (B, L), residual (B, L, D) -> (B, L, D)."""
        return ops.dechunk_ema(h, p, sel, ste_coefficient(p), residual)


def ste_coefficient(p: Tensor) -> Tensor | None:
    """(B, L) the straight-through coefficient c, or None where p needs no gradient: c has no other effect."""
    return torch.where(p > 0.5, p, 1 - p) if p.requires_grad else None
