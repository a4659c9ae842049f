"""adaLN on packed tokens on Triton kernels: all operations with one backward."""

from typing import Any

import torch
from torch import Tensor

from dcdit.kernels import modulation
from dcdit.ops._triton.kernel_op import KernelOp, unit_stride, unit_strides, without_gradient
from dcdit.ops.affine import fold_affine
from dcdit.ops.numerics import widest


def modulated_layer_norm(
    t: Tensor,
    shift: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor,
    eps: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    if weight is not None or bias is not None:
        return _affine_norm(t, shift, scale, cu_seqlens, eps, weight, bias, False)
    normed, _ = _norm(*unit_strides(t, shift, scale, cu_seqlens), eps, False, False)
    return normed


def modulated_rms_norm(
    t: Tensor, shift: Tensor | None, scale: Tensor, cu_seqlens: Tensor, eps: float, weight: Tensor | None
) -> Tensor:
    return _affine_norm(t, shift, scale, cu_seqlens, eps, weight, None, True)


def _affine_norm(
    t: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    cu_seqlens: Tensor,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    rms: bool,
) -> Tensor:
    whole = weight is not None or bias is not None
    if whole:
        shift, scale = fold_affine(shift, scale, weight, bias)
    t, scale, cu_seqlens = unit_strides(t, scale, cu_seqlens)
    normed, _ = _norm(t, None if shift is None else unit_stride(shift), scale, cu_seqlens, eps, rms, whole)
    return normed


def gated_add(x: Tensor, y: Tensor, gate: Tensor, cu_seqlens: Tensor) -> Tensor:
    return _add(*unit_strides(x, y, gate, cu_seqlens))


def gated_add_modulated_layer_norm(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    added, normed, _ = _add_norm(*unit_strides(x, y, gate, shift, scale, cu_seqlens), eps)
    return added, normed


def _norm_fake(
    t: Tensor, shift: Tensor | None, scale: Tensor, cu_seqlens: Tensor, eps: float, rms: bool, whole: bool
) -> tuple[Tensor, Tensor]:
    return t.new_empty(t.shape), t.new_empty((2, t.shape[0]), dtype=torch.float32)


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    t, _, scale, cu_seqlens, _, *ctx.kind = inputs
    without_gradient(ctx, output[1])
    ctx.save_for_backward(t, scale, output[1], cu_seqlens)


def _norm_backward(ctx: Any, grad: Tensor, _stats: None) -> tuple[Tensor | None, ...]:
    t, scale, stats, cu_seqlens = ctx.saved_tensors
    want_t, want_shift, want_scale = ctx.needs_input_grad[:3]
    wanted = (t.dtype if want_t else None, None, False, want_shift or want_scale)
    rows = None, grad, t, None, None, scale, stats, cu_seqlens
    grad_t, _, _, grad_shift, grad_scale = _gradients(wanted, *rows, *ctx.kind)
    return grad_t, grad_shift if want_shift else None, grad_scale, None, None, None, None


def _add_fake(x: Tensor, y: Tensor, gate: Tensor, cu_seqlens: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=widest(x, y))


def _add_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, gate, cu_seqlens = inputs
    ctx.dtypes = x.dtype, y.dtype
    ctx.save_for_backward(y if ctx.needs_input_grad[2] else None, gate, cu_seqlens)


def _add_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    y, gate, cu_seqlens = ctx.saved_tensors
    wanted = (*_wanted_dtypes(ctx), ctx.needs_input_grad[2], False)
    return *_gradients(wanted, grad, None, None, y, gate, None, None, cu_seqlens)[:3], None


def _add_norm_fake(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    added, normed = (x.new_empty(x.shape, dtype=widest(x, y)) for _ in range(2))
    return added, normed, x.new_empty((2, x.shape[0]), dtype=torch.float32)


def _add_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, y, gate, _, scale, cu_seqlens, _ = inputs
    added, _, stats = output
    ctx.dtypes = x.dtype, y.dtype
    without_gradient(ctx, stats)
    ctx.save_for_backward(added, y if ctx.needs_input_grad[2] else None, gate, scale, stats, cu_seqlens)


def _add_norm_backward(
    ctx: Any, grad_added: Tensor | None, grad_normed: Tensor | None, _stats: None
) -> tuple[Tensor | None, ...]:
    want_gate, want_shift, want_scale = ctx.needs_input_grad[2:5]
    wanted = (*_wanted_dtypes(ctx), want_gate, want_shift or want_scale)
    return *_gradients(wanted, grad_added, grad_normed, *ctx.saved_tensors), None, None


def _wanted_dtypes(ctx: Any) -> tuple[torch.dtype | None, ...]:
    """The dtypes of the gradients of x and y, None where not wanted."""
    return tuple(dtype if need else None for dtype, need in zip(ctx.dtypes, ctx.needs_input_grad, strict=False))


def _gradients(
    wanted: tuple[torch.dtype | None, torch.dtype | None, bool, bool],
    grad_added: Tensor | None,
    grad_normed: Tensor | None,
    added: Tensor | None,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    stats: Tensor | None,
    cu_seqlens: Tensor,
    rms: bool = False,
    whole: bool = False,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, y, gate, shift and scale, None where not wanted.

    ``wanted`` has the dtypes for x and for y (None: not wanted), and two flags: for the gate, and for shift and scale.
    """
    x_dtype, y_dtype, want_gate, want_norm = wanted
    if grad_normed is None:
        # Without a norm, the gradient of x is the gradient of the sum, and no kernel computes it.
        assert grad_added is not None
        grad_x = None if x_dtype is None else grad_added.to(x_dtype)
        if y_dtype is None and not want_gate:
            return grad_x, None, None, None, None
        added, scale, stats, x_dtype, want_norm = grad_added, None, None, None, False
    rows = (tensor if tensor is None else unit_stride(tensor) for tensor in (grad_added, grad_normed))
    computed_x, grad_y, modulation_grads = _backward(
        *rows, added, y if want_gate else None, gate, scale, stats, cu_seqlens, x_dtype, y_dtype, want_norm, rms, whole
    )
    parts = modulation_grads.unbind(1)
    return (
        grad_x if grad_normed is None else None if x_dtype is None else computed_x,
        None if y_dtype is None else grad_y,
        parts[-1] if want_gate else None,
        parts[0] if want_norm else None,
        parts[1] if want_norm else None,
    )


def _backward_fake(
    grad_added: Tensor | None,
    grad_normed: Tensor | None,
    added: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    stats: Tensor | None,
    cu_seqlens: Tensor,
    x_dtype: torch.dtype | None,
    y_dtype: torch.dtype | None,
    want_norm: bool,
    rms: bool,
    whole: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    table = gate if scale is None else scale
    assert table is not None
    parts = 2 * want_norm + (y is not None)
    return (
        added.new_empty(0) if x_dtype is None else added.new_empty(added.shape, dtype=x_dtype),
        added.new_empty(0) if y_dtype is None else added.new_empty(added.shape, dtype=y_dtype),
        table.new_empty(table.shape[0], parts, table.shape[1]),
    )


_backward = KernelOp("modulation_bwd", modulation.modulation_bwd, _backward_fake)
_norm = KernelOp("modulated_norm", modulation.modulated_norm_fwd, _norm_fake)
_norm.differentiate(_norm_setup, _norm_backward)
_add = KernelOp("gated_add", modulation.gated_add_fwd, _add_fake).differentiate(_add_setup, _add_backward)
_add_norm = KernelOp(
    "gated_add_modulated_layer_norm", modulation.gated_add_modulated_layer_norm_fwd, _add_norm_fake
).differentiate(_add_norm_setup, _add_norm_backward)
