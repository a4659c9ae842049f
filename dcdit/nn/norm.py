"""Normalisations that keep the dtype and the memory format of their input."""

import torch.nn.functional as F
from torch import Tensor, nn

from dcdit import ops
from dcdit.ops.autocast import without_autocast


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm`` (eps 1e-5) whose output has the dtype of its input, also under autocast.

    Example:
        >>> import torch
        >>> from dcdit.nn import RMSNorm
        >>> RMSNorm(2)(torch.tensor([[3.0, 4.0]])).detach()  # divided by the root of (9 + 16) / 2
        tensor([[0.8485, 1.1314]])
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            # With a weight of another dtype, PyTorch would not take its fused implementation.
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class GroupNormSiLU(nn.GroupNorm):
    """``SiLU(GroupNorm(x + shift))`` in x's dtype, as one operation; x (B, C, H, W) is channels-last.

    Example:
        >>> import torch
        >>> from dcdit.nn import GroupNormSiLU
        >>> norm = GroupNormSiLU(8, 32)
        >>> x = torch.randn(2, 32, 4, 4).to(memory_format=torch.channels_last)
        >>> plain = torch.nn.functional.silu(torch.nn.functional.group_norm(x, 8))
        >>> torch.allclose(norm(x), plain, atol=1e-5)
        True
    """

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return ops.group_norm_silu(x, self.num_groups, self.weight, self.bias, shift, self.eps)
