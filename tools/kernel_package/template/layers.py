"""Layers whose ``forward`` Hugging Face's ``kernels`` puts in place of that of a layer with the same attributes.

They have no constructor and no state: what they read is what the layer has that they take the place of. Both
``forward`` must take the same arguments.
"""

from torch import Tensor, nn

from . import ops


class GroupNormSiLU(nn.Module):
    """For a layer with the attributes of ``torch.nn.GroupNorm`` that applies SiLU too: (B, C, H, W) -> (B, C, H, W)."""

    can_torch_compile: bool = True
    num_groups: int
    weight: Tensor
    bias: Tensor
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        return ops.group_norm_silu(x, self.num_groups, self.weight, self.bias, None, self.eps)


class ModulatedLayerNorm(nn.Module):
    """For a layer norm without weights that adaLN modulates, on packed tokens: (T, D) -> (T, D).

    Its arguments are those of ``modulated_layer_norm``: (B, D) shift and scale, and cu_seqlens.
    """

    can_torch_compile: bool = True
    eps: float

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor) -> Tensor:
        return ops.modulated_layer_norm(x, shift, scale, cu_seqlens, self.eps)
