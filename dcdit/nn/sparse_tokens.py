"""From all tokens of a grid to a few and back: pooled as in SparseDiT (arXiv 2412.06028), or chosen by a router."""

import math
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from dcdit import ops
from dcdit.nn.chunk import SpatialDeChunk
from dcdit.nn.identity import set_to_identity
from dcdit.nn.memory_format import to_grid, to_tokens
from dcdit.nn.routers import ROUTERS
from dcdit.nn.stages import stage


class Chosen(NamedTuple):
    """The tokens that a router chose."""

    prob: Tensor
    """(B, L) float32."""
    selection: ops.TokenSelection


class SparseTokens(nn.Module):
    """Both ways of a module. All tokens come back as ``spread(from_sparse(sparse)) + from_full(full)``.

    At the start the second layer is the identity and the first zero, as in the published code: all tokens stay what
    they were before the sparse blocks. The result has the dtype of full, also under autocast.

    Args:
        dim: D.
        grid: (H, W) of all tokens.
    """

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.from_sparse = nn.Linear(dim, dim)
        self.from_full = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in (self.from_sparse.weight, self.from_sparse.bias, self.from_full.bias):
            nn.init.zeros_(parameter)
        set_to_identity(self.from_full.weight)


class PooledTokens(SparseTokens):
    """Means of rectangles of the grid, brought back by nearest upsampling.

    Example:
        >>> import torch
        >>> from dcdit.nn import PooledTokens
        >>> tokens, full = PooledTokens(1, grid=(2, 2)), torch.tensor([[[1.0], [2.0], [3.0], [6.0]]])
        >>> sparse, chosen = tokens.sparsify(full, (1, 1))
        >>> sparse.tolist(), tokens.restore(sparse, full, (1, 1), chosen).flatten().tolist()  # new: as before
        ([[[3.0]]], [1.0, 2.0, 3.0, 6.0])
    """

    def sparsify(self, full: Tensor, grid: tuple[int, int]) -> tuple[Tensor, None]:
        """All tokens (B, H*W, D) -> (B, h*w, D) for a grid (h, w), by adaptive average pooling."""
        with stage("gather"):
            return to_tokens(F.adaptive_avg_pool2d(to_grid(full, self.grid), grid)), None

    def restore(self, sparse: Tensor, full: Tensor, grid: tuple[int, int], chosen: None) -> Tensor:
        """Sparse tokens (B, h*w, D) and all tokens in front of them (B, H*W, D) -> (B, H*W, D)."""
        with stage("dechunk"):
            # A linear layer on copies of rows is a copy of its results on the rows.
            rows = to_grid(self.from_sparse(sparse), grid)
            spread = to_tokens(F.interpolate(rows, self.grid, mode="nearest"))
            return (spread + self.from_full(full)).to(full.dtype)


class RoutedTokens(SparseTokens):
    """The tokens that are hardest to predict from their neighbours, brought back by DC-DiT's de-chunking.

    Args:
        dim: D.
        grid: (H, W) of all tokens.
        router: a name in :data:`dcdit.nn.ROUTERS`.
        sigma: of the de-chunking, in tokens.

    Example:
        >>> import torch
        >>> from dcdit.nn import RoutedTokens
        >>> tokens = RoutedTokens(2, grid=(1, 3), router="cosine1d", sigma=1.0)
        >>> full = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]])
        >>> sparse, chosen = tokens.sparsify(full, (1, 2))
        >>> chosen.selection.indices.tolist(), sparse.tolist()  # the first, and the one unlike the one before it
        ([0, 2], [[[1.0, 0.0], [-1.0, 0.0]]])
    """

    def __init__(self, dim: int, grid: tuple[int, int], router: str, sigma: float) -> None:
        super().__init__(dim, grid)
        self.router = ROUTERS[router](dim, grid)
        self.dechunk = SpatialDeChunk(grid, sigma)

    def sparsify(self, full: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Chosen]:
        """All tokens (B, H*W, D) -> the h*w most probable of each image, (B, h*w, D) in raster order."""
        with stage("router"):
            prob = self.router(full)
        with stage("select"):
            selection = ops.select_tokens(prob, budget=math.prod(grid))
        with stage("gather"):
            packed = ops.gather_tokens(full, selection)
            return packed.view(len(full), math.prod(grid), full.shape[2]), Chosen(prob, selection)

    def restore(self, sparse: Tensor, full: Tensor, grid: tuple[int, int], chosen: Chosen) -> Tensor:
        """Sparse tokens (B, h*w, D) and all tokens in front of them (B, H*W, D) -> (B, H*W, D)."""
        with stage("dechunk"):
            rows = self.from_sparse(sparse).flatten(0, 1)
            return self.dechunk(rows, *chosen, self.from_full(full)).to(full.dtype)
