"""The DiT block (arXiv 2212.09748, section 3.2) for packed tokens and for a dense batch."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcdit import ops
from dcdit.nn.gates import Widths
from dcdit.nn.linear_gelu import linear_gelu
from dcdit.nn.modulation import Modulation
from dcdit.nn.plain import is_plain
from dcdit.ops import unchecked


class VarlenMeta(NamedTuple):
    """Where the images of a packed buffer begin and end, as variable-length attention wants it.

    Example:
        >>> import torch
        >>> from dcdit import ops
        >>> from dcdit.nn import VarlenMeta
        >>> sel = ops.select_tokens(torch.tensor([[0.9, 0.2, 0.7], [0.6, 0.8, 0.9]]))
        >>> varlen = VarlenMeta(sel.cu_seqlens, sel.max_seqlen, padding=False)
        >>> varlen.cu_seqlens.tolist(), varlen.max_seqlen
        ([0, 2, 5], 3)
    """

    cu_seqlens: Tensor
    """(B+1,) int32."""
    max_seqlen: int
    """Tokens of the longest image, or an upper bound."""
    padding: bool
    """Whether the buffer may hold rows past ``cu_seqlens[-1]``."""


class PendingResidual(NamedTuple):
    """A residual branch that is not added yet: the next block adds it in the same pass as its first norm.

    Example:
        >>> import torch
        >>> from dcdit import ops
        >>> from dcdit.nn import PendingResidual
        >>> pending = PendingResidual(branch=torch.ones(3, 2), gate=torch.tensor([[0.0, 2.0]]))
        >>> ops.gated_add(torch.ones(3, 2), pending.branch, pending.gate, torch.tensor([0, 3])).tolist()
        [[1.0, 3.0], [1.0, 3.0], [1.0, 3.0]]
    """

    branch: Tensor
    """(T, D). Padding rows may hold anything."""
    gate: Tensor
    """(B, D)."""


class DiTBlockBase(nn.Module):
    """The weights of a block. Its adaLN is a part of :class:`dcdit.nn.StackedModulation`.

    Args:
        dim: D.
        num_heads: divides D.
        mlp_ratio: hidden width of the MLP divided by D.
        mlp_norm_eps: eps of the norm before the MLP.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, mlp_norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.mlp_norm_eps = mlp_norm_eps
        self._create_inputs(dim)
        self.proj = nn.Linear(dim, dim)
        self.fc1 = nn.Linear(dim, int(dim * mlp_ratio))
        self.fc2 = nn.Linear(int(dim * mlp_ratio), dim)

    def _create_inputs(self, dim: int) -> None:
        """The linear layers in front of the attention."""
        self.qkv = nn.Linear(dim, 3 * dim)

    def mlp(self, x: Tensor, mask: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """(..., D) -> (..., D). A mask is applied to the hidden units before the GELU, which leaves 0 as it is."""
        if mask is None:
            return self.fc2(linear_gelu(self.fc1, x))
        return self.fc2(F.gelu(mask(self.fc1(x)), approximate="tanh"))


class PackedDiTBlock(DiTBlockBase):
    """A block for packed tokens.

    The first block of a chain, the one without a pending branch, checks its arguments. The others trust that they get
    the same kind of tokens, ``varlen`` and modulation: checks in every block would cost the host more than its kernels.

    Padding rows: the norms make them zero, so they are the bias in q, k and v, and no row of another image reads them.
    In inference attention leaves them unwritten in its result, and the next gated residual reads none of them. Where
    ``proj`` may be more than a linear layer (:mod:`dcdit.nn.plain`), or a gradient is wanted, they are zero there too.

    Example:
        >>> import torch
        >>> from dcdit import ops
        >>> from dcdit.nn import DenseDiTBlock, Modulation, PackedDiTBlock, VarlenMeta
        >>> packed, dense = PackedDiTBlock(8, 2, mlp_ratio=4.0), DenseDiTBlock(8, 2, mlp_ratio=4.0)
        >>> _ = dense.load_state_dict(packed.state_dict())
        >>> x, mod = torch.randn(2, 5, 8), Modulation(*torch.randn(6, 2, 8))
        >>> cu_seqlens = torch.tensor([0, 5, 10]).int()
        >>> tokens, pending = packed(x.flatten(0, 1), None, mod, VarlenMeta(cu_seqlens, 5, padding=False))
        >>> out = ops.gated_add(tokens, pending.branch, pending.gate, cu_seqlens)
        >>> torch.allclose(out.view(2, 5, 8), dense(x, mod), atol=1e-5)
        True
    """

    def attention(self, x: Tensor, varlen: VarlenMeta, heads: Tensor | None = None) -> Tensor:
        qkv = self.qkv(x)
        out = unchecked.self_attention(
            qkv.view(x.shape[0], 3, self.num_heads, qkv.shape[1] // (3 * self.num_heads)),
            *varlen,
            zero_padding=varlen.padding and not is_plain(self.proj, nn.Linear),
        ).flatten(1)
        return self.proj(out if heads is None else mask_packed(out, heads, varlen.cu_seqlens))

    def forward(
        self,
        x: Tensor,
        pending: PendingResidual | None,
        mod: Modulation,
        varlen: VarlenMeta,
        widths: Widths | None = None,
    ) -> tuple[Tensor, PendingResidual]:
        """Tokens (T, D) and the pending branch of the previous block -> tokens (T, D) and this block's pending branch.

        ``x + gate * branch`` of what is returned is the output of the block. Padding rows of x must be finite. Heads
        and groups whose gate in ``widths`` is 0 are computed and masked.

        Raises:
            ValueError, TypeError: in the first block, where shapes, dtypes or devices do not fit.
        """
        cu_seqlens = varlen.cu_seqlens
        if pending is None:
            unchecked.check_packed(x, *varlen)
            h = ops.modulated_layer_norm(x, mod.attn_shift, mod.attn_scale, cu_seqlens)
        else:
            x, h = unchecked.gated_add_modulated_layer_norm(x, *pending, mod.attn_shift, mod.attn_scale, cu_seqlens)
        branch = self.attention(h, varlen, None if widths is None else widths.heads)
        x, h = unchecked.gated_add_modulated_layer_norm(
            x, branch, mod.attn_gate, mod.mlp_shift, mod.mlp_scale, cu_seqlens, self.mlp_norm_eps
        )
        mask = None if widths is None else partial(mask_packed, gates=widths.groups, cu_seqlens=cu_seqlens)
        return x, PendingResidual(self.mlp(h, mask), mod.mlp_gate)


class DenseBlockBase(DiTBlockBase):
    """A block for a dense batch, in operations that ``torch.compile`` fuses. A subclass has the attention."""

    def mlp_branch(self, x: Tensor, mod: Modulation, groups: Tensor | None = None) -> Tensor:
        """What the second half adds to x (B, L, D). Hidden units whose gate (B, G) is 0 are computed and masked."""
        shift, scale, gate = (row[:, None] for row in mod[3:])
        mask = None if groups is None else partial(mask_dense, gates=groups)
        return gate * self.mlp(modulate(x, shift, scale, self.mlp_norm_eps), mask)


class DenseDiTBlock(DenseBlockBase):
    """A DiT block for a dense batch.

    Example:
        >>> import torch
        >>> from dcdit.nn import DenseDiTBlock, Modulation
        >>> block, x, zero = DenseDiTBlock(8, 2, mlp_ratio=4.0), torch.randn(2, 5, 8), torch.zeros(2, 8)
        >>> torch.equal(block(x, Modulation(zero, zero, zero, zero, zero, zero)), x)  # closed gates: the identity
        True
    """

    def attention(self, x: Tensor, heads: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(out if heads is None else mask_dense(out, heads))

    def forward(
        self,
        x: Tensor,
        mod: Modulation,
        widths: Widths | None = None,
        mlp_mask: Callable[[Tensor], Tensor] | None = None,
    ) -> Any:
        """(B, L, D) -> (B, L, D).

        Args:
            widths: heads and groups whose gate is 0 are computed and masked.
            mlp_mask: gives the gates (B, L) of the tokens in front of the MLP; where one is 0, what the MLP adds is
                masked. These gates are then returned, too.
        """
        x = self.attend(x, mod, None if widths is None else widths.heads)
        branch = self.mlp_branch(x, mod, None if widths is None else widths.groups)
        if mlp_mask is None:
            return x + branch
        mask = mlp_mask(x)
        return x + mask[..., None].to(x.dtype) * branch, mask

    def attend(self, x: Tensor, mod: Modulation, heads: Tensor | None = None) -> Tensor:
        """The first half of a block, (B, L, D) -> (B, L, D). Heads whose gate (B, H) is 0 are computed and masked."""
        shift, scale, gate = (row[:, None] for row in mod[:3])
        return x + gate * self.attention(modulate(x, shift, scale), heads)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """``LayerNorm(x) * (1 + scale) + shift`` for a dense batch (B, L, D); shift and scale are (B, 1, D)."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def mask_dense(x: Tensor, gates: Tensor) -> Tensor:
    """x (B, L, C) times gates (B, n), each for C / n channels that lie side by side."""
    return x * _of_channels(gates, x.shape[-1])[:, None].to(x.dtype)


def mask_packed(x: Tensor, gates: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The same for packed rows (T, C), each with the gates of its image. Padding rows come out as zeros."""
    return unchecked.gated_add(torch.zeros_like(x), x, _of_channels(gates, x.shape[-1]), cu_seqlens)


def _of_channels(gates: Tensor, channels: int) -> Tensor:
    """(B, n) -> (B, channels)."""
    return gates[..., None].expand(*gates.shape, channels // gates.shape[1]).flatten(1)
