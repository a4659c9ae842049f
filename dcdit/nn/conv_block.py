"""Residual convolutions of the encoder and the decoder (DC-DiT, arXiv 2603.06351, architecture)."""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from dcdit.nn.memory_format import to_grid, to_tokens
from dcdit.nn.norm import GroupNormSiLU, RMSNorm
from dcdit.nn.plain import is_plain, is_plain_conv3x3


class ConvBlock(nn.Module):
    """GroupNorm, SiLU, conv3x3, plus conditioning, GroupNorm, SiLU, conv3x3, plus skip.

    Args:
        in_dim, out_dim: widths, both multiples of 32. The inner width is the smaller of the two.
        cond_dim: width of the conditioning.

    Example:
        >>> import torch
        >>> from dcdit.nn import ConvBlock
        >>> block = ConvBlock(32, 32, cond_dim=8)
        >>> _ = torch.nn.init.zeros_(block.conv2.weight), torch.nn.init.zeros_(block.conv2.bias)
        >>> x = torch.randn(1, 32, 4, 4).to(memory_format=torch.channels_last)
        >>> torch.equal(block(x, torch.randn(1, 8)), x)  # the skip is all that is left
        True
    """

    GROUPS = 32

    def __init__(self, in_dim: int, out_dim: int, cond_dim: int) -> None:
        super().__init__()
        inner = min(in_dim, out_dim)
        self.norm1 = GroupNormSiLU(self.GROUPS, in_dim)
        self.conv1 = nn.Conv2d(in_dim, inner, 3, padding=1)
        self.cond_proj = nn.Linear(cond_dim, inner)
        self.norm2 = GroupNormSiLU(self.GROUPS, inner)
        self.conv2 = nn.Conv2d(inner, out_dim, 3, padding=1)
        self.skip = nn.Linear(in_dim, out_dim) if in_dim != out_dim else None

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """(B, in_dim, H, W) channels-last and SiLU(conditioning) (B, cond_dim) -> (B, out_dim, H, W) channels-last."""
        h, shift = self.norm1(x), self.cond_proj(cond)
        if is_plain_conv3x3(self.conv1):
            # The convolution's bias is added to the conditioning, not in a pass of its own over the grid.
            h, shift = F.conv2d(h, self.conv1.weight, padding=1), shift + self.conv1.bias
        else:
            h = self.conv1(h)
        if is_plain(self.norm2, GroupNormSiLU):
            h = self.norm2(h, shift)
        else:
            h = self.norm2(h + shift.to(h.dtype)[:, :, None, None])
        if self.skip is None:
            return self.conv2(h) + x
        x = x.permute(0, 2, 3, 1)
        if is_plain_conv3x3(self.conv2) and is_plain(self.skip, nn.Linear) and self.skip.bias is not None:
            # Likewise, the product adds this bias without a pass of its own.
            h = F.conv2d(h, self.conv2.weight, padding=1)
            x = F.linear(x, self.skip.weight, self.skip.bias + self.conv2.bias)  # type: ignore[operator]
        else:
            h, x = self.conv2(h), self.skip(x)
        return h + x.permute(0, 3, 1, 2)


class ConvStack(nn.Module):
    """Conv blocks and then an RMSNorm: the encoder or the decoder.

    Args:
        widths: channels before, between and after the blocks.
        cond_dim: width of the conditioning.

    Example:
        >>> import torch
        >>> from dcdit.nn import ConvStack
        >>> encoder = ConvStack((32, 32, 128), cond_dim=8)
        >>> out = encoder(torch.randn(1, 16, 32), (4, 4), torch.randn(1, 8))
        >>> out.shape, round(out.square().mean().item(), 2)  # the norm at its end: mean square 1
        (torch.Size([1, 16, 128]), 1.0)
    """

    def __init__(self, widths: tuple[int, ...], cond_dim: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ConvBlock(before, after, cond_dim) for before, after in pairwise(widths))
        self.norm = RMSNorm(widths[-1])

    def forward(self, tokens: Tensor, grid: tuple[int, int], cond: Tensor) -> Tensor:
        """(B, L, widths[0]) -> (B, L, widths[-1]); cond is SiLU(conditioning) (B, cond_dim)."""
        x = to_grid(tokens, grid)
        for block in self.blocks:
            x = block(x, cond)
        return self.norm(to_tokens(x))
