"""Constants and integer arithmetic that kernels, PyTorch backend and reference share. This file imports nothing."""

PROB_EPS = 1e-4
"""A probability enters the de-chunkers as ``q = clamp(p, PROB_EPS, 1 - PROB_EPS)``."""

ROW_EPS = 1e-8
"""Added to the sum of a row of smoothing weights before the division by it."""

NORM_EPS = 1e-12
"""Smallest norm that a vector is divided by when a cosine is taken."""


def cdiv(a: int, b: int) -> int:
    """``ceil(a / b)``."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    # Triton's own function is wrapped for use inside kernels, and costs the host several times as much.
    return 1 << (n - 1).bit_length()
