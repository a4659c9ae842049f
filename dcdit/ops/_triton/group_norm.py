"""Group norm of channels-last images and SiLU on Triton kernels."""

from typing import Any

import torch
from torch import Tensor

from dcdit.kernels import group_norm
from dcdit.ops._triton.kernel_op import KernelOp, unit_stride, without_gradient


def group_norm_silu(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, shift: Tensor | None, eps: float
) -> Tensor:
    shift = None if shift is None else unit_stride(shift)
    y, _ = _forward(unit_stride(x), num_groups, weight.contiguous(), bias.contiguous(), shift, eps)
    return y


def _forward_fake(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.shape[0], 2, x.shape[2]), dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.num_groups, weight, bias, shift, _ = inputs
    without_gradient(ctx, output[1])
    ctx.dtypes = weight.dtype, bias.dtype, None if shift is None else shift.dtype
    ctx.save_for_backward(x, weight, bias, output[1])


def _backward(ctx: Any, grad: Tensor, _stats: None) -> tuple[Tensor | None, ...]:
    need_x, _, need_weight, need_bias, need_shift, _ = ctx.needs_input_grad
    x, weight, bias, stats = ctx.saved_tensors
    weight_dtype, bias_dtype, shift_dtype = ctx.dtypes
    grad_x, sums, grad_shift = _gradients(
        grad.contiguous(), x, ctx.num_groups, weight, bias, stats, shift_dtype if need_shift else None, need_x
    )
    return (
        grad_x if need_x else None,
        None,
        sums[0].to(weight_dtype) if need_weight else None,
        sums[1].to(bias_dtype) if need_bias else None,
        grad_shift if need_shift else None,
        None,
    )


def _gradients_fake(
    grad: Tensor, x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, stats: Tensor,
    shift_dtype: torch.dtype | None, need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        x.new_empty(x.shape if need_x else (0,)),
        x.new_empty((2, x.shape[2]), dtype=torch.float32),
        x.new_empty(0) if shift_dtype is None else x.new_empty((x.shape[0], x.shape[2]), dtype=shift_dtype),
    )


_gradients = KernelOp("group_norm_silu_bwd", group_norm.group_norm_silu_bwd, _gradients_fake)
_forward = KernelOp("group_norm_silu", group_norm.group_norm_silu_fwd, _forward_fake).differentiate(_setup, _backward)
