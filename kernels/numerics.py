"""Numbers that kernels, PyTorch backend and reference share. Imports nothing, so that anybody may import it."""

PROB_EPS = 1e-4
"""A probability enters the de-chunkers as ``q = clamp(p, PROB_EPS, 1 - PROB_EPS)``."""

ROW_EPS = 1e-8
"""Added to the sum of a row of smoothing weights before dividing by it."""

NORM_EPS = 1e-12
"""The least norm that a vector is divided by when a cosine is taken."""


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    # Triton's own is wrapped for use inside kernels, and costs the host several times as much.
    return 1 << (n - 1).bit_length()
