"""Normalisations that keep the dtype and the memory format of their input."""

import torch.nn.functional as F
from torch import Tensor, nn

from dcdit import ops
from dcdit.nn.autocast import without_autocast


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm`` (eps 1e-5) whose output has the dtype of its input, also under autocast."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            # With a weight of another dtype, PyTorch would not take its fused implementation.
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class GroupNormSiLU(nn.GroupNorm):
    """``SiLU(GroupNorm(x + shift))`` in x's dtype, as one operation; x (B, C, H, W) is channels-last."""

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return ops.group_norm_silu(x, self.num_groups, self.weight, self.bias, shift, self.eps)
