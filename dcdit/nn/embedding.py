"""Embeddings of the timestep, the class label and the position (DiT, arXiv 2212.09748, section 3.2)."""

import math

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn

from dcdit.utils.modules import dtype_of


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of t through a two-layer MLP: (B,) -> (B, D).

    Args:
        dim: D.
        frequency_shift: the i-th of n frequencies is ``10000 ** (-i / (n - frequency_shift))``. 0 in DiT, 1 in
            diffusers.

    Example:
        >>> import torch
        >>> from dcdit.nn import TimestepEmbedder
        >>> embedder = TimestepEmbedder(8)
        >>> one, both = embedder(torch.tensor([500])), embedder(torch.tensor([0, 500]))
        >>> both.shape, torch.allclose(both[1:], one, atol=1e-6)
        (torch.Size([2, 8]), True)
    """

    FREQUENCIES = 128

    def __init__(self, dim: int, frequency_shift: int = 0) -> None:
        super().__init__()
        self.frequency_shift = frequency_shift
        self.fc1 = nn.Linear(2 * self.FREQUENCIES, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        # Computed in float32 every time, because model.to(bfloat16) would round a buffer.
        steps = torch.arange(self.FREQUENCIES, dtype=torch.float32, device=t.device)
        frequencies = torch.exp(steps * (-math.log(10000.0) / (self.FREQUENCIES - self.frequency_shift)))
        angles = t[:, None].float() * frequencies
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.fc2(F.silu(self.fc1(features.to(dtype_of(self.fc1)))))


class SeparateTimestepEmbedders(nn.ModuleList):
    """A timestep embedder for each of several blocks: (B,) -> (depth, B, D).

    Args:
        depth: number of blocks.
        dim, frequency_shift: as in :class:`TimestepEmbedder`.

    Example:
        >>> import torch
        >>> from dcdit.nn import SeparateTimestepEmbedders
        >>> embedders, t = SeparateTimestepEmbedders(depth=3, dim=8), torch.tensor([0, 500])
        >>> torch.equal(embedders(t)[2], embedders[2](t))
        True
    """

    def __init__(self, depth: int, dim: int, frequency_shift: int = 0) -> None:
        super().__init__(TimestepEmbedder(dim, frequency_shift) for _ in range(depth))

    def forward(self, t: Tensor) -> Tensor:
        return torch.stack([embedder(t) for embedder in self])


class LabelEmbedder(nn.Module):
    """Class labels (B,) -> (B, D). Label ``num_classes`` is the null class; it exists if ``dropout_prob`` is above 0.

    Args:
        num_classes: labels 0 to ``num_classes - 1``.
        dim: D.
        dropout_prob: in training mode, the chance that a label is replaced by the null class. Set the attribute to 0
            to embed labels that a training loop has dropped itself (:func:`drop_labels`).
        depth: of several blocks with a table each: the result is (depth, B, D). A label is dropped for all of them.

    Example:
        >>> import torch
        >>> from dcdit.nn import LabelEmbedder
        >>> embedder = LabelEmbedder(num_classes=10, dim=8, dropout_prob=0.1).eval()
        >>> torch.equal(embedder(torch.tensor([3, 10])), embedder.table.weight[[3, 10]])  # 10 is the null class
        True
    """

    def __init__(self, num_classes: int, dim: int, dropout_prob: float, depth: int | None = None) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob
        self.depth = depth
        self.rows = num_classes + (dropout_prob > 0)
        self.table = nn.Embedding((depth or 1) * self.rows, dim)

    def forward(self, y: Tensor) -> Tensor:
        if self.training and self.dropout_prob > 0:
            dropped = torch.rand(y.shape, device=y.device) < self.dropout_prob
            y = drop_labels(y, dropped, self.num_classes)
        if self.depth is not None:
            y = y + self.rows * torch.arange(self.depth, device=y.device)[:, None]
        return self.table(y)


def of_first_block(embedded: Tensor) -> Tensor:
    """What layers outside of the blocks see: (depth, B, D) -> (B, D). A conditioning that all share stays as it is."""
    return embedded[0] if embedded.dim() == 3 else embedded


def drop_labels(y: Tensor, dropped: Tensor, null_class: int) -> Tensor:
    """Labels y (B,) with ``null_class`` where ``dropped`` (B,) bool is set: training for classifier-free guidance."""
    return y.masked_fill(dropped, null_class)


def sincos_position(dim: int, grid: tuple[int, int], patch_size: int = 1) -> Tensor:
    """Fixed 2-D sine-cosine position table: (H*W, D) float32 in raster order.

    The first half of the channels encodes the column and the second half the row, each as sines then cosines.

    Args:
        dim: D, a multiple of 4.
        grid: (H, W).
        patch_size: P, the unit of length in grid cells. A cell gets the position of its centre, a fraction, on the
            coarser grid whose cells hold P x P cells of this one.

    Example:
        >>> from dcdit.nn import sincos_position
        >>> sincos_position(4, (2, 2))  # sine and cosine of the column, then of the row
        tensor([[0.0000, 1.0000, 0.0000, 1.0000],
                [0.8415, 0.5403, 0.0000, 1.0000],
                [0.0000, 1.0000, 0.8415, 0.5403],
                [0.8415, 0.5403, 0.8415, 0.5403]])
    """
    height, width = grid
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    rows = repeat(torch.arange(height, dtype=torch.float64), "row -> (row col)", col=width)
    cols = repeat(torch.arange(width, dtype=torch.float64), "col -> (row col)", row=height)
    angles = [((axis + 0.5) / patch_size - 0.5)[:, None] * frequencies for axis in (cols, rows)]
    return torch.cat([wave for a in angles for wave in (a.sin(), a.cos())], dim=1).float()
