"""adaLN-Zero of all transformer blocks in one matrix product (DiT, arXiv 2212.09748, section 3.2)."""

from typing import NamedTuple

from torch import Tensor, nn


class Modulation(NamedTuple):
    """What one block reads from the conditioning: six (B, D) views.

    Example:
        >>> import torch
        >>> from dcdit.nn import Modulation
        >>> mod = Modulation(*torch.arange(12.0).view(6, 1, 2))
        >>> mod.attn_shift.tolist(), mod.mlp_gate.tolist()
        ([[0.0, 1.0]], [[10.0, 11.0]])
    """

    attn_shift: Tensor
    attn_scale: Tensor
    attn_gate: Tensor
    mlp_shift: Tensor
    mlp_scale: Tensor
    mlp_gate: Tensor


class StackedModulation(nn.Module):
    """One Linear for the adaLN of all blocks, which see the same conditioning.

    Its rows are DiT's weights of the first block, then those of the second, and so on. Within a block they are shift,
    scale and gate of the attention, then of the MLP. One parameter holds them, because stacking one parameter per
    block would copy a third of the model in every forward.

    Args:
        dim: D.
        depth: number of blocks.

    Example:
        >>> import torch
        >>> from dcdit.nn import StackedModulation
        >>> layer = StackedModulation(dim=2, depth=3)
        >>> cond = torch.randn(1, 2)
        >>> rows = layer(cond)
        >>> len(rows), torch.equal(rows[1].attn_shift, layer.linear(cond)[:, 12:14])  # 6 rows of 2 for each block
        (3, True)
    """

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 6 * dim * depth)

    def forward(self, cond: Tensor) -> list[Modulation]:
        """SiLU(conditioning) (B, D) -> the modulation of each block."""
        rows = self.linear(cond).unflatten(1, (-1, cond.shape[1])).unbind(1)
        return [Modulation(*rows[i : i + 6]) for i in range(0, len(rows), 6)]


class SeparateModulation(nn.Module):
    """The adaLN of blocks that each have a conditioning of their own. Rows as in :class:`StackedModulation`.

    Args:
        dim: D.
        depth: number of blocks.

    Example:
        >>> import torch
        >>> from dcdit.nn import SeparateModulation
        >>> layer, cond = SeparateModulation(dim=2, depth=3), torch.randn(3, 1, 2)
        >>> torch.equal(layer(cond)[1].attn_scale, layer.linears[1](cond[1])[:, 2:4])
        True
    """

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(dim, 6 * dim) for _ in range(depth))

    def forward(self, cond: Tensor) -> list[Modulation]:
        """SiLU(conditioning) (depth, B, D) -> the modulation of each block."""
        return [Modulation(*linear(own).chunk(6, dim=1)) for linear, own in zip(self.linears, cond, strict=True)]
