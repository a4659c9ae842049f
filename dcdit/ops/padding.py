"""Zeros in the padding rows of a packed buffer: those past ``cu_seqlens[-1]``, which a capacity leaves unused.

For what a kernel has just written, except in rows of no sequence, as attention kernels do. No public operation: it
changes its argument, and autograd must not see that.
"""

import torch
from torch import Tensor

from dcdit.ops.autograd import first_derivative_only
from dcdit.ops.backend import backend_name


def zero_padding_(t: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Write zeros to the padding rows of t (T, ...), in place, and return t. No other row is read or written.

    The write does not count as a change for autograd: a kernel that has saved t for its backward can still run it.
    Under ``torch.compile`` the result is a new tensor, and its gradient too has zeros in padding rows.

    Args:
        t: any dtype. Where it is not contiguous, or on a GPU without Triton, all rows are written.
        cu_seqlens: int32 (B+1,), read on the device.
    """
    if torch.compiler.is_compiling():
        return t.masked_fill(_is_padding(t, cu_seqlens), 0)
    rows = t.data  # the same memory, with a version counter of its own
    if backend_name(t) == "triton" and rows.is_contiguous():
        from dcdit.kernels.padding import zero_padding

        zero_padding(rows, cu_seqlens.contiguous())
    elif rows.is_cuda:
        rows.masked_fill_(_is_padding(t, cu_seqlens), 0)
    else:
        rows[int(cu_seqlens[-1]) :].zero_()
    return t


class ZeroPaddingOfGradient(torch.autograd.Function):
    """``(t, cu_seqlens) -> t``. The gradient gets zeros in padding rows, in place: nothing else may hold it."""

    @staticmethod
    def forward(t: Tensor, cu_seqlens: Tensor) -> Tensor:
        return t.view_as(t)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(inputs[1])

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return zero_padding_(grad, *ctx.saved_tensors), None


def _is_padding(t: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(T, 1, ...) bool."""
    is_padding = torch.arange(t.shape[0], device=t.device) >= cu_seqlens[-1]
    return is_padding.view(-1, *[1] * (t.dim() - 1))
