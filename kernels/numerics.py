"""Constants and integer arithmetic that kernels, PyTorch backend and reference share. Nothing here needs Triton."""

import torch
from torch import Tensor

PROB_EPS = 1e-4
"""A probability enters the de-chunkers as ``q = clamp(p, PROB_EPS, 1 - PROB_EPS)``."""

ROW_EPS = 1e-8
"""Added to the sum of a row of smoothing weights before the division by it."""

NORM_EPS = 1e-12
"""Smallest norm that a vector is divided by when a cosine is taken."""

LARGE = 2.0**50
"""A row with a larger norm (or entry) is shrunk before a cosine is taken. Products of other rows cannot overflow."""

SHRINKING_FACTOR = 2.0**-80
"""What such a row is multiplied with. A power of two rounds nothing."""


def widest(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that holds the values of all tensors: of two dtypes the wider, float32 for bfloat16 with float16."""
    widest, *others = [x.dtype for x in tensors if x is not None]
    for dtype in others:
        if dtype != widest:
            widest = torch.promote_types(widest, dtype)
    return widest


def cdiv(a: int, b: int) -> int:
    """``ceil(a / b)``."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    # Triton's own function is wrapped for use inside kernels, and costs the host several times as much.
    return 1 << (n - 1).bit_length()
