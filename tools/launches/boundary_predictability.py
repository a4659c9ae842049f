"""Launches of the predictability boundary, for the ahead-of-time check. The router works at a quarter of the width."""

import torch

from dcdit.kernels import boundary_predictability


def launches(dtype: torch.dtype, width: int) -> None:
    channels = max(width // 32, 1) * 8
    planes = torch.empty(2, channels, 256, dtype=dtype)
    rows = torch.empty(2, 256, channels, dtype=dtype).transpose(1, 2)
    parameters = torch.empty(3, channels).unbind()
    for x in (planes, rows):
        p, stats = boundary_predictability.predictability_fwd(x, *parameters, torch.empty(()), 8, 1e-5)
        boundary_predictability.predictability_bwd(p, x, *parameters, p, stats, True)
