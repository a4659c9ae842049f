"""Launches of the ratio loss, for the ahead-of-time check."""

import torch

from dcdit.kernels import ratio_loss


def launches(dtype: torch.dtype, width: int) -> None:
    p = torch.empty(4, 256, dtype=dtype)
    ratio_loss.ratio_loss_fwd(p, p > 0.5, 4.0, 2)
