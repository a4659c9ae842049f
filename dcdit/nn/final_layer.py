"""The last adaLN and the projection to pixels or latents (DiT, arXiv 2212.09748, section 3.2)."""

import torch
from torch import Tensor, nn

from dcdit import ops
from dcdit.nn.dit_block import modulate


class PackedFinalLayer(nn.Module):
    """``Linear(LayerNorm(x) * (1 + scale) + shift)`` through the operation for packed tokens.

    Args:
        dim: width of the tokens.
        out_dim: numbers per token.
        cond_dim: width of the conditioning.

    Example:
        >>> import torch
        >>> from dcdit.nn import PackedFinalLayer
        >>> layer = PackedFinalLayer(8, 4, cond_dim=6)
        >>> _ = torch.nn.init.zeros_(layer.linear.weight), torch.nn.init.constant_(layer.linear.bias, 0.5)
        >>> layer(torch.randn(2, 5, 8), torch.randn(2, 6)).unique().tolist()
        [0.5]
    """

    def __init__(self, dim: int, out_dim: int, cond_dim: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(cond_dim, 2 * dim)
        self.linear = nn.Linear(dim, out_dim)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """(B, L, dim) and SiLU(conditioning) (B, cond_dim) -> (B, L, out_dim)."""
        b, length, _ = x.shape
        shift, scale = self.modulation(cond).chunk(2, dim=1)
        # The full grid is a packed buffer in which every image has the same length.
        cu_seqlens = torch.arange(0, (b + 1) * length, length, dtype=torch.int32, device=x.device)
        tokens = ops.modulated_layer_norm(x.flatten(0, 1), shift, scale, cu_seqlens)
        return self.linear(tokens).unflatten(0, (b, length))


class DenseFinalLayer(PackedFinalLayer):
    """The same in operations that ``torch.compile`` fuses.

    Example:
        >>> import torch
        >>> from dcdit.nn import DenseFinalLayer, PackedFinalLayer
        >>> dense, packed = DenseFinalLayer(8, 4, cond_dim=6), PackedFinalLayer(8, 4, cond_dim=6)
        >>> _ = packed.load_state_dict(dense.state_dict())
        >>> x, cond = torch.randn(2, 5, 8), torch.randn(2, 6)
        >>> torch.allclose(dense(x, cond), packed(x, cond), atol=1e-5)
        True
    """

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        shift, scale = self.modulation(cond)[:, None].chunk(2, dim=2)
        return self.linear(modulate(x, shift, scale))
