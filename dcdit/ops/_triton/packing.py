"""Gather and scatter on Triton kernels; each is the other's backward."""

from typing import Any

import torch
from torch import Tensor

from dcdit.kernels import pack
from dcdit.ops._triton._registration import KernelOp, unit_stride
from dcdit.ops.selection import TokenSelection


def gather_tokens(x: Tensor, sel: TokenSelection, bias: Tensor | None) -> Tensor:
    rows = unit_stride(x.reshape(-1, x.shape[-1]))
    bias = None if bias is None else bias.contiguous()
    return _gather(rows, sel.indices.contiguous(), sel.slots.contiguous(), bias)


def scatter_tokens(t: Tensor, sel: TokenSelection, fill: float) -> Tensor:
    return _scatter(unit_stride(t), sel.indices.contiguous(), sel.slots.contiguous(), fill).view(
        *sel.mask.shape, t.shape[-1]
    )


def _gather_launch(x: Tensor, indices: Tensor, slots: Tensor, bias: Tensor | None) -> Tensor:
    return pack.gather_fwd(x, indices, bias)


def _gather_fake(x: Tensor, indices: Tensor, slots: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(indices.shape[0], x.shape[1])


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, indices, slots, bias = inputs
    ctx.save_for_backward(indices, slots)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    indices, slots = ctx.saved_tensors
    grad = grad.contiguous()
    grad_x = _scatter(grad, indices, slots, 0.0) if ctx.needs_input_grad[0] else None
    grad_bias = _bias_grad(grad, slots, ctx.bias_dtype) if ctx.needs_input_grad[3] else None
    return grad_x, None, None, grad_bias


def _scatter_launch(t: Tensor, indices: Tensor, slots: Tensor, fill: float) -> Tensor:
    return pack.scatter_fwd(t, slots, fill)


def _scatter_fake(t: Tensor, indices: Tensor, slots: Tensor, fill: float) -> Tensor:
    return t.new_empty(slots.numel(), t.shape[1])


def _scatter_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, indices, slots, _ = inputs
    ctx.save_for_backward(indices, slots)


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    indices, slots = ctx.saved_tensors
    return _gather(unit_stride(grad), indices, slots, None), None, None, None


def _bias_grad_fake(grad: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(slots.shape[1], grad.shape[1], dtype=dtype)


_bias_grad = KernelOp("gather_bias_bwd", pack.bias_bwd, _bias_grad_fake)
_gather = KernelOp("gather_tokens", _gather_launch, _gather_fake).differentiate(_gather_setup, _gather_backward)
_scatter = KernelOp("scatter_tokens", _scatter_launch, _scatter_fake).differentiate(_scatter_setup, _scatter_backward)
