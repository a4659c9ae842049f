"""Activations and their derivatives, for use inside kernels."""

import triton
import triton.language as tl


@triton.jit
def silu(y):
    return y * tl.sigmoid(y)


@triton.jit
def silu_derivative(y):
    sigmoid = tl.sigmoid(y)
    return sigmoid * (1.0 + y * (1.0 - sigmoid))
