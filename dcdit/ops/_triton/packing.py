"""Gather and scatter on Triton kernels. Each is the backward of the other."""

from typing import Any

import torch
from torch import Tensor

from dcdit.kernels import packing as kernels
from dcdit.ops._triton.kernel_op import KernelOp, unit_stride
from dcdit.ops.token_selection import TokenSelection


def gather_tokens(x: Tensor, sel: TokenSelection, bias: Tensor | None) -> Tensor:
    if x.dtype is torch.bool:
        return gather_tokens(x.view(torch.uint8), sel, None).view(torch.bool)
    rows = unit_stride(x.reshape(-1, x.shape[-1]))
    bias = None if bias is None else bias.contiguous()
    packed_rows = sel.packed_rows.contiguous()
    shared = rows.shape[0] != packed_rows.numel()  # one table for several images, or for none
    return _gather(rows, sel.indices.contiguous(), packed_rows, bias, shared)


def scatter_tokens(t: Tensor, sel: TokenSelection, fill: float) -> Tensor:
    if t.dtype is torch.bool:
        return scatter_tokens(t.view(torch.uint8), sel, fill).view(torch.bool)
    return _scatter(unit_stride(t), sel.indices.contiguous(), sel.packed_rows.contiguous(), float(fill)).view(
        *sel.mask.shape, t.shape[-1]
    )


def _gather_launch(x: Tensor, indices: Tensor, packed_rows: Tensor, bias: Tensor | None, shared: bool) -> Tensor:
    return kernels.gather_fwd(x, indices, bias, shared)


def _gather_fake(x: Tensor, indices: Tensor, packed_rows: Tensor, bias: Tensor | None, shared: bool) -> Tensor:
    return x.new_empty(indices.shape[0], x.shape[1])


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, indices, packed_rows, bias, shared = inputs
    ctx.save_for_backward(indices, packed_rows)
    ctx.shared_dtype = x.dtype if shared else None
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    indices, packed_rows = ctx.saved_tensors
    grad = grad.contiguous()
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0] and ctx.shared_dtype is None:
        grad_x = _scatter(grad, indices, packed_rows, 0.0)
    elif ctx.needs_input_grad[0]:
        grad_x = _bias_grad(grad, packed_rows, ctx.shared_dtype)
    if ctx.needs_input_grad[3]:
        grad_bias = _bias_grad(grad, packed_rows, ctx.bias_dtype)
    return grad_x, None, None, grad_bias, None


def _scatter_launch(t: Tensor, indices: Tensor, packed_rows: Tensor, fill: float) -> Tensor:
    return kernels.scatter_fwd(t, packed_rows, fill)


def _scatter_fake(t: Tensor, indices: Tensor, packed_rows: Tensor, fill: float) -> Tensor:
    return t.new_empty(packed_rows.numel(), t.shape[1])


def _scatter_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, indices, packed_rows, _ = inputs
    ctx.save_for_backward(indices, packed_rows)


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    indices, packed_rows = ctx.saved_tensors
    return _gather(unit_stride(grad), indices, packed_rows, None, False), None, None, None


def _bias_grad_fake(grad: Tensor, packed_rows: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(packed_rows.shape[1], grad.shape[1], dtype=dtype)


_bias_grad = KernelOp("gather_bias_bwd", kernels.bias_bwd, _bias_grad_fake)
_gather = KernelOp("gather_tokens", _gather_launch, _gather_fake).differentiate(_gather_setup, _gather_backward)
_scatter = KernelOp("scatter_tokens", _scatter_launch, _scatter_fake).differentiate(_scatter_setup, _scatter_backward)
