"""Ratio loss on Triton kernels."""

from typing import Any

import torch
from torch import Tensor

from dcdit.kernels import ratio_loss as kernels
from dcdit.ops._triton.kernel_op import KernelOp


def ratio_loss(p: Tensor, natural_mask: Tensor, target: float, group_size: int | None) -> Tensor:
    groups = 1 if group_size is None else p.shape[0] // group_size
    loss, _ = _loss(p.contiguous(), natural_mask.contiguous(), target, groups)
    return loss


def _fake(p: Tensor, mask: Tensor, target: float, groups: int) -> tuple[Tensor, Tensor]:
    return p.new_empty((), dtype=torch.float32), p.new_empty((groups,), dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    p, *_ = inputs
    _, slopes = output
    ctx.mark_non_differentiable(slopes)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(slopes)
    ctx.shape, ctx.dtype = p.shape, p.dtype


def _backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    (slopes,) = ctx.saved_tensors
    # One number per group: a broadcast needs no kernel of its own.
    per_group = (grad * slopes).to(ctx.dtype)[:, None]
    return per_group.expand(slopes.shape[0], ctx.shape.numel() // slopes.shape[0]).reshape(ctx.shape), None, None, None


_loss = KernelOp("ratio_loss", kernels.ratio_loss_fwd, _fake).differentiate(_setup, _backward)
