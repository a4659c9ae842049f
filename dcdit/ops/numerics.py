"""The precision of the operations: constants, accumulation dtype, reach of the smoothing window."""

import math

import torch
from torch import Tensor

from dcdit.kernels.numerics import NORM_EPS, PROB_EPS, ROW_EPS

__all__ = ["NORM_EPS", "PROB_EPS", "ROW_EPS", "upcast", "window_radius"]


def upcast(x: Tensor) -> Tensor:
    """x in the dtype that arithmetic accumulates in: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def window_radius(sigma: float, prob_floor: float, dtype: torch.dtype = torch.float32) -> int:
    """How many grid cells the window of the Gaussian smoothing reaches in each direction.

    The window is at least 6 sigma. It must be so wide that everything outside rounds away in ``dtype``. A plane full of
    tokens farther away than r weighs less than ``2 pi sigma^2 exp(-r^2 / (2 sigma^2))`` together. The token itself
    weighs at least ``prob_floor``. In float32, 6 sigma is enough for the sigmas 1 and 2 of the paper. A budget has no
    floor and takes 7 to 8 sigma.

    Args:
        sigma: standard deviation in grid cells.
        prob_floor: lower bound of the probability of a kept token (``TokenSelection.prob_floor``).
        dtype: of the accumulation.
    """
    own_weight = max(prob_floor, PROB_EPS)
    half_ulp = torch.finfo(dtype).eps / 2
    plane = max(2 * math.pi * sigma**2, own_weight)
    # The nearest cell outside is at radius + 1.
    needed = math.ceil(sigma * math.sqrt(2 * math.log(plane / (half_ulp * own_weight)))) - 1
    return max(math.ceil(6 * sigma), needed)
