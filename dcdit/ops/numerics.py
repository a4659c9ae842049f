"""The precision of the operations: constants, accumulation dtype, reach of the smoothing window."""

import math

import torch
from torch import Tensor

from dcdit.kernels.numerics import LARGE, NORM_EPS, PROB_EPS, ROW_EPS, SHRINKING_FACTOR, widest

__all__ = [
    "LARGE",
    "NORM_EPS",
    "PROB_EPS",
    "ROW_EPS",
    "accumulation_dtype",
    "shrinking_factor",
    "upcast",
    "upcast_all",
    "widest",
    "window_radius",
]

_SHRINKING = {torch.float32: (LARGE, SHRINKING_FACTOR), torch.float64: (2.0**450, 2.0**-600)}
"""By dtype: the norm above which rows are shrunk, and the factor."""


def upcast(x: Tensor) -> Tensor:
    """x in the dtype that arithmetic accumulates in: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype that arithmetic with all of these tensors accumulates in: float64 if one of them is, else float32."""
    return torch.float64 if torch.float64 in [x.dtype for x in tensors] else torch.float32


def upcast_all(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the one dtype that arithmetic with all of them accumulates in."""
    dtype = accumulation_dtype(*tensors)
    return tuple([x.to(dtype) for x in tensors])


def shrinking_factor(norm: Tensor) -> Tensor:
    """What to multiply rows of these norms with before their norms and products are taken: 1 where nothing overflows.

    The square of an entry overflows from about 1e19 on in float32, so the norm may be infinite. The factor is a power
    of two, so it rounds nothing, and a cosine does not depend on it.
    """
    large, factor = _SHRINKING[norm.dtype]
    return torch.where(norm > large, factor, torch.ones_like(norm))


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
