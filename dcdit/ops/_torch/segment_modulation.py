"""Modulation one segment at a time, so that the (B, D) tables are never expanded to (T, D)."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dcdit.ops.autograd import first_derivative_only
from dcdit.ops.numerics import upcast


class SegmentLayerNorm(torch.autograd.Function):
    """``LayerNorm(t) * (1 + scale[seg]) + shift[seg]``; padding rows, past the last bound, come out as 0."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, shift: Tensor, scale: Tensor, bounds: list[int], eps: float) -> Tensor:
        real = upcast(t[: bounds[-1]])
        out, mean, rstd = torch.native_layer_norm(real, real.shape[1:], None, None, eps)
        ctx.save_for_backward(t, scale, mean, rstd)
        ctx.bounds, ctx.shift_dtype = bounds, shift.dtype
        shift, factor = upcast(shift), 1 + upcast(scale)
        for b, (lo, hi) in enumerate(pairwise(bounds)):
            torch.addcmul(shift[b], out[lo:hi], factor[b], out=out[lo:hi])
        return _with_padding(out.to(t.dtype), t.shape[0])

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        t, scale, mean, rstd = ctx.saved_tensors
        bounds = ctx.bounds
        real, grad = upcast(t[: bounds[-1]]), upcast(grad)
        factor = 1 + upcast(scale)
        grad_shift, grad_scale, grad_normed = torch.zeros_like(factor), torch.zeros_like(factor), torch.empty_like(real)
        for b, (lo, hi) in enumerate(pairwise(bounds)):
            g = grad[lo:hi]
            torch.sum(g, 0, out=grad_shift[b])
            normed = (real[lo:hi] - mean[lo:hi]).mul_(rstd[lo:hi])
            torch.sum(normed.mul_(g), 0, out=grad_scale[b])
            torch.mul(g, factor[b], out=grad_normed[lo:hi])
        grad_t, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad_normed, real, real.shape[1:], mean, rstd, None, None, [True, False, False]
        )
        return (
            _with_padding(grad_t.to(t.dtype), t.shape[0]),
            grad_shift.to(ctx.shift_dtype),
            grad_scale.to(scale.dtype),
            None,
            None,
        )


class SegmentGatedAdd(torch.autograd.Function):
    """``x + gate[seg] * y``; padding rows, past the last bound, come out as they are in x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, gate: Tensor, bounds: list[int]) -> Tensor:
        ctx.save_for_backward(y, gate)
        ctx.bounds = bounds
        out, row = torch.empty_like(x), upcast(gate)
        for b, (lo, hi) in enumerate(pairwise(bounds)):
            out[lo:hi] = torch.addcmul(upcast(x[lo:hi]), row[b], upcast(y[lo:hi]))
        out[bounds[-1] :] = x[bounds[-1] :]
        return out

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        y, gate = ctx.saved_tensors
        row = upcast(gate)
        grad_y, grad_gate = torch.zeros_like(y), torch.zeros_like(row)
        for b, (lo, hi) in enumerate(pairwise(ctx.bounds)):
            g = upcast(grad[lo:hi])
            torch.mul(g, row[b], out=grad_y[lo:hi])
            torch.sum(g * y[lo:hi], 0, out=grad_gate[b])
        return grad, grad_y, grad_gate.to(gate.dtype), None


def _with_padding(rows: Tensor, total: int) -> Tensor:
    """(total, D): the rows, then zeros."""
    if rows.shape[0] == total:
        return rows
    return torch.cat([rows, rows.new_zeros(total - rows.shape[0], rows.shape[1])])
