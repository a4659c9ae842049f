"""Autocast changes no operation: what it returns, forward and backward, is the same as without.

The public functions call their backend inside :func:`without_autocast`, which reaches the forward. The gradients of
``autograd.Function`` are computed inside of it too (autograd.py). What PyTorch differentiates by itself stays out of
reach: a backward may run with autocast on, and then PyTorch rounds the products in it. Backends therefore multiply
matrices by :func:`dcdit.ops.autograd.matmul`.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_AS_IT_IS = nullcontext()


def without_autocast(x: Tensor) -> AbstractContextManager:
    """A context in which PyTorch computes in the dtype of its inputs, also where autocast is on for x's device."""
    device = "cuda" if x.is_cuda else x.device.type  # the attribute of most GPUs costs less than the name
    if device == "meta":  # which autocast does not know
        return _AS_IT_IS
    # The compiler traces a backward together with its forward: it may yet run under autocast.
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return _AS_IT_IS
