"""Ratio loss on Triton kernels."""

from typing import Any

import torch
from torch import Tensor

from dcdit.kernels import ratio_loss as kernels
from dcdit.ops._triton.kernel_op import KernelOp, without_gradient


def ratio_loss(p: Tensor, natural_mask: Tensor, target: float, group_size: int | None) -> Tensor:
    groups = 1 if group_size is None else p.shape[0] // group_size
    loss, _ = _loss(p.contiguous(), natural_mask.contiguous(), target, groups)
    return loss


def _fake(p: Tensor, mask: Tensor, target: float, groups: int) -> tuple[Tensor, Tensor]:
    return p.new_empty((), dtype=torch.float32), p.new_empty((groups,), dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    p, *_ = inputs
    _, grad_p = output
    without_gradient(ctx, grad_p)
    ctx.save_for_backward(grad_p)
    ctx.shape, ctx.dtype = p.shape, p.dtype


def _backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    (grad_p,) = ctx.saved_tensors
    groups = grad_p.shape[0]
    # All positions of a group have the same gradient. A broadcast writes it, without a kernel of our own.
    per_group = (grad * grad_p).to(ctx.dtype)[:, None]
    return per_group.expand(groups, ctx.shape.numel() // groups).reshape(ctx.shape), None, None, None


_loss = KernelOp("ratio_loss", kernels.ratio_loss_fwd, _fake).differentiate(_setup, _backward)
