"""Modulation one segment at a time, so that the (B, D) tables are never expanded to (T, D)."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dcdit.ops.autograd import first_derivative_only
from dcdit.ops.numerics import accumulation_dtype, upcast_all, widest


class SegmentNorm(torch.autograd.Function):
    """``norm(t) * (1 + scale[seg]) + shift[seg]``, where ``whole`` without the 1.

    The norm is LayerNorm, where ``rms`` RMSNorm. Padding rows, past the last bound, come out as 0.
    """

    @staticmethod
    def forward(
        t: Tensor, shift: Tensor, scale: Tensor, bounds: list[int], eps: float, rms: bool, whole: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The result, and the mean (of RMSNorm 0) and 1 / standard deviation of each row."""
        real, shift, scale = upcast_all(t[: bounds[-1]], shift, scale)
        if rms:
            rstd = (torch.linalg.vecdot(real, real) / real.shape[1] + eps).rsqrt()[:, None]
            mean, out = torch.zeros_like(rstd), real * rstd
        else:
            out, mean, rstd = torch.native_layer_norm(real, real.shape[1:], None, None, eps)
        factor = scale if whole else 1 + scale
        for b, (lo, hi) in enumerate(pairwise(bounds)):
            torch.addcmul(shift[b], out[lo:hi], factor[b], out=out[lo:hi])
        return _with_padding(out.to(t.dtype), t.shape[0]), mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        t, shift, scale, ctx.bounds, _, ctx.rms, ctx.whole = inputs
        _, mean, rstd = output
        ctx.shift_dtype = shift.dtype
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(t, scale, mean, rstd)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        t, scale, mean, rstd = ctx.saved_tensors
        bounds = ctx.bounds
        # The statistics have the dtype of the arithmetic.
        real, grad, factor = t[: bounds[-1]].to(mean.dtype), grad.to(mean.dtype), scale.to(mean.dtype)
        if not ctx.whole:
            factor = 1 + factor
        grad_shift, grad_scale, grad_normed = torch.zeros_like(factor), torch.zeros_like(factor), torch.empty_like(real)
        for b, (lo, hi) in enumerate(pairwise(bounds)):
            g = grad[lo:hi]
            torch.sum(g, 0, out=grad_shift[b])
            normed = (real[lo:hi] - mean[lo:hi]).mul_(rstd[lo:hi])
            torch.sum(normed.mul_(g), 0, out=grad_scale[b])
            torch.mul(g, factor[b], out=grad_normed[lo:hi])
        if ctx.rms:
            normed = real * rstd
            shared = torch.linalg.vecdot(grad_normed, normed)[:, None] / real.shape[1]
            grad_t = torch.addcmul(grad_normed, normed, shared, value=-1).mul_(rstd)
        else:
            grad_t, _, _ = torch.ops.aten.native_layer_norm_backward(
                grad_normed, real, real.shape[1:], mean, rstd, None, None, [True, False, False]
            )
        return (
            _with_padding(grad_t.to(t.dtype), t.shape[0]),
            grad_shift.to(ctx.shift_dtype),
            grad_scale.to(scale.dtype),
            *[None] * 4,
        )


class SegmentGatedAdd(torch.autograd.Function):
    """``x + gate[seg] * y``; padding rows, past the last bound, come out as they are in x."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, gate: Tensor, bounds: list[int]) -> Tensor:
        out, dtype = x.new_empty(x.shape, dtype=widest(x, y)), accumulation_dtype(x, y, gate)
        row = gate.to(dtype)
        for b, (lo, hi) in enumerate(pairwise(bounds)):
            out[lo:hi] = torch.addcmul(x[lo:hi].to(dtype), row[b], y[lo:hi].to(dtype))
        out[bounds[-1] :] = x[bounds[-1] :]
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, y, gate, ctx.bounds = inputs
        ctx.x_dtype, ctx.dtype = x.dtype, accumulation_dtype(x, y, gate)
        ctx.save_for_backward(y, gate)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        y, gate = ctx.saved_tensors
        row = gate.to(ctx.dtype)
        grad_y, grad_gate = y.new_zeros(y.shape), row.new_zeros(row.shape)
        for b, (lo, hi) in enumerate(pairwise(ctx.bounds)):
            g = grad[lo:hi].to(row.dtype)
            torch.mul(g, row[b], out=grad_y[lo:hi])
            torch.sum(g * y[lo:hi], 0, out=grad_gate[b])
        return grad.to(ctx.x_dtype), grad_y, grad_gate.to(gate.dtype), None


def _with_padding(rows: Tensor, total: int) -> Tensor:
    """(total, D): the rows, then zeros."""
    if rows.shape[0] == total:
        return rows
    return torch.cat([rows, rows.new_zeros(total - rows.shape[0], rows.shape[1])])
