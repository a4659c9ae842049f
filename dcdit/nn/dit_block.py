"""The DiT block (arXiv 2212.09748, section 3.2), over packed sequences and over a dense batch."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from dcdit import ops
from dcdit.nn.modulation import Modulation


class VarlenMeta(NamedTuple):
    """Where the images of a packed buffer begin and end."""

    cu_seqlens: Tensor
    """(B+1,) int32."""
    max_seqlen: int
    padding: bool
    """Whether the buffer may hold rows past the last image."""


class Pending(NamedTuple):
    """A residual branch that is not added yet, so that the addition can share a pass with the next norm."""

    branch: Tensor
    """(T, D)."""
    gate: Tensor
    """(B, D)."""


class DiTBlockBase(nn.Module):
    """The weights of a block; its adaLN lives in :class:`dcdit.nn.StackedModulation`.

    Args:
        dim: D.
        num_heads: divides D.
        mlp_ratio: width of the MLP over D.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.fc1 = nn.Linear(dim, int(dim * mlp_ratio))
        self.fc2 = nn.Linear(int(dim * mlp_ratio), dim)

    def mlp(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class PackedDiTBlock(DiTBlockBase):
    """A block over packed tokens."""

    def attention(self, x: Tensor, seqs: VarlenMeta) -> Tensor:
        q, k, v = self.qkv(x).unflatten(1, (3, self.num_heads, -1)).unbind(1)
        out = ops.varlen_attention(q, k, v, seqs.cu_seqlens, seqs.max_seqlen, padding=seqs.padding)
        return self.proj(out.flatten(1))

    def forward(self, x: Tensor, pending: Pending | None, mod: Modulation, seqs: VarlenMeta) -> tuple[Tensor, Pending]:
        """Tokens (T, D) and the branch that the previous block left to add -> tokens, and the branch left to add."""
        cu_seqlens = seqs.cu_seqlens
        if pending is None:
            h = ops.modulated_layer_norm(x, mod.attn_shift, mod.attn_scale, cu_seqlens)
        else:
            x, h = ops.gated_add_modulated_layer_norm(x, *pending, mod.attn_shift, mod.attn_scale, cu_seqlens)
        branch = self.attention(h, seqs)
        x, h = ops.gated_add_modulated_layer_norm(x, branch, mod.attn_gate, mod.mlp_shift, mod.mlp_scale, cu_seqlens)
        return x, Pending(self.mlp(h), mod.mlp_gate)


class DenseDiTBlock(DiTBlockBase):
    """A block over a dense batch, in operations that ``torch.compile`` fuses.

    Args:
        dim, num_heads, mlp_ratio: as above.
        mlp_norm_eps: of the norm before the MLP.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, mlp_norm_eps: float = 1e-6) -> None:
        super().__init__(dim, num_heads, mlp_ratio)
        self.mlp_norm_eps = mlp_norm_eps

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, mod: Modulation) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (row[:, None] for row in mod)
        x = x + gate * self.attention(modulate(x, shift, scale))
        return x + mlp_gate * self.mlp(modulate(x, mlp_shift, mlp_scale, self.mlp_norm_eps))


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """``LayerNorm(x) * (1 + scale) + shift`` over a dense batch; shift and scale broadcast against x."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift
