"""The blocks of a SparseDiT that a DiT does not have (arXiv 2412.06028): attention that pools, and cross-attention."""

import torch.nn.functional as F
from torch import Tensor, nn

from dcdit.nn.dit_block import DenseBlockBase, modulate
from dcdit.nn.modulation import Modulation


class PooledDiTBlock(DenseBlockBase):
    """A block whose attention gives every token of an image the same weight, so it needs neither queries nor keys.

    Example:
        >>> import torch
        >>> from dcdit.nn import PooledDiTBlock
        >>> block, x = PooledDiTBlock(8, 2, mlp_ratio=4.0), torch.randn(1, 5, 8)
        >>> torch.allclose(block.attention(x), block.attention(x.flip(1)), atol=1e-6)  # a mean knows no order
        True
    """

    def _create_inputs(self, dim: int) -> None:
        self.value = nn.Linear(dim, dim)

    def attention(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, 1, D). The mean of the values is the value of the mean, which is one row for each image."""
        return self.proj(self.value(x.mean(1, keepdim=True)))

    def forward(self, x: Tensor, mod: Modulation) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        shift, scale, gate = (row[:, None] for row in mod[:3])
        x = x + gate * self.attention(modulate(x, shift, scale))
        return x + self.mlp_branch(x, mod)


class CrossDiTBlock(DenseBlockBase):
    """A block whose tokens attend to those of a source. Both pass the same norm and modulation in front of it.

    Example:
        >>> import torch
        >>> from dcdit.nn import CrossDiTBlock, Modulation
        >>> block, x, zero = CrossDiTBlock(8, 2, mlp_ratio=4.0), torch.randn(1, 3, 8), torch.zeros(1, 8)
        >>> closed = Modulation(zero, zero, zero, zero, zero, zero)
        >>> torch.equal(block(x, closed, source=torch.randn(1, 7, 8)), x)  # closed gates: the identity
        True
        >>> block.attention(x, torch.randn(1, 7, 8)).shape
        torch.Size([1, 3, 8])
    """

    def _create_inputs(self, dim: int) -> None:
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)

    def attention(self, x: Tensor, source: Tensor) -> Tensor:
        """x (B, L, D), source (B, M, D) -> (B, L, D)."""
        q = self.query(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.key_value(source).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, mod: Modulation, source: Tensor) -> Tensor:
        """x (B, L, D), source (B, M, D) -> (B, L, D)."""
        shift, scale, gate = (row[:, None] for row in mod[:3])
        x = x + gate * self.attention(modulate(x, shift, scale), modulate(source, shift, scale))
        return x + self.mlp_branch(x, mod)
