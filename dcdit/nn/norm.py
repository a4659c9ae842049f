"""Normalisations that keep the dtype and the memory format of their input."""

import torch.nn.functional as F
from torch import Tensor, nn

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
    """``SiLU(GroupNorm(x))`` in x's dtype. On a GPU, autocast alone would return float32, twice the bytes."""

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.silu(F.group_norm(x, self.num_groups, weight, bias, self.eps))
