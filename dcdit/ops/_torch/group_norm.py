"""Group norm of channels-last images, and SiLU.

PyTorch's own group norm of such an image has two faults on a CPU. It takes the variance from sums of squares, which
lose it where the mean is large. And its backward ends the process if the image needs no gradient.
"""

from typing import Any

import torch
from torch import Tensor

from dcdit.ops.autograd import apply, first_derivative_only
from dcdit.ops.numerics import accumulation_dtype


def group_norm_silu(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, shift: Tensor | None, eps: float
) -> Tensor:
    arguments = (x, num_groups, weight, bias, shift, eps)
    y, *_ = apply(_GroupNormSiLU, *arguments) if torch.is_grad_enabled() else _GroupNormSiLU.forward(*arguments)
    return y


def group_norm(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Group norm alone, of x (B, L, C) in the dtype of weight and bias. Twice differentiable."""
    if x.numel() == 0:  # the norm of no position would be NaN, and so would its gradients
        return x * (weight + bias)
    image = _as_image(x + offset_to_zero_mean(x.detach(), num_groups, None, x.dtype))
    if torch.is_grad_enabled() and not image.requires_grad:
        # Three dimensions are never channels-last; four are, even when contiguous, where there is one position.
        return torch.group_norm(image.squeeze(2).contiguous(), num_groups, weight, bias, eps).mT
    return torch.group_norm(image, num_groups, weight, bias, eps).squeeze(2).mT


def offset_to_zero_mean(x: Tensor, num_groups: int, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(B, 1, C): what to add to x (B, L, C), so that the mean of every group is zero and the shift is in it."""
    mean = x.mean(1, keepdim=True, dtype=dtype)
    if shift is None:
        return _group_mean(mean.neg_(), num_groups)
    shift = shift.unsqueeze(1)
    return shift - _group_mean(mean.add_(shift), num_groups)


def _group_mean(values: Tensor, num_groups: int) -> Tensor:
    """(B, 1, C) -> (B, 1, C), the mean of its group in the place of each channel."""
    groups = values.view(values.shape[0], num_groups, values.shape[2] // num_groups)
    return groups.mean(2, keepdim=True).expand_as(groups).reshape(values.shape)


def _as_image(x: Tensor) -> Tensor:
    """(B, L, C) -> (B, C, 1, L), channels-last."""
    return x.mT.unsqueeze(2)


class _GroupNormSiLU(torch.autograd.Function):
    """The backward computes x_hat again, so x is all that is kept of its size."""

    @staticmethod
    def forward(
        x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, shift: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The result; what is added to x (B, 1, C) and multiplied with the sum (B, groups) to get x_hat."""
        dtype = accumulation_dtype(x, weight, bias, *(() if shift is None else (shift,)))
        # native_group_norm reads the memory of the two as if it had no gaps.
        weight, bias = weight.to(dtype).contiguous(), bias.to(dtype).contiguous()
        offset = offset_to_zero_mean(x, num_groups, None if shift is None else shift.to(dtype), dtype)
        images, length, channels = x.shape
        if length == 0:  # native_group_norm refuses it from PyTorch 2.14 on
            return torch.empty_like(x), offset, offset.new_ones(images, num_groups)
        centred = (x + offset).contiguous()
        image = _as_image(centred)
        if not image.is_cpu:  # the kernels of other devices take no channels-last image
            image = image.contiguous()
        normed, _, rstd = torch.native_group_norm(image, weight, bias, images, channels, length, num_groups, eps)
        # Into memory that is at hand. A view of another tensor could not be changed in place later.
        y = torch.ops.aten.silu.out(normed.squeeze(2).mT, out=centred)
        return y.to(x.dtype), offset, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, ctx.num_groups, weight, bias, shift, _ = inputs
        _, offset, rstd = output
        ctx.shift_dtype = None if shift is None else shift.dtype
        ctx.mark_non_differentiable(offset, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, offset, rstd)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        x, weight, bias, offset, rstd = ctx.saved_tensors
        need_x, _, _, _, need_shift, _ = ctx.needs_input_grad
        rstd = rstd.repeat_interleave(x.shape[2] // ctx.num_groups, 1).unsqueeze(1)
        scale, length = weight.to(rstd.dtype), max(x.shape[1], 1)
        # Contiguous, whatever the strides of x: torch.compile accepts no other tensor as out below.
        x_hat = (x + offset).contiguous().mul_(rstd)
        normed = (x_hat * scale).add_(bias)
        grad_normed = torch.ops.aten.silu_backward(grad.to(rstd.dtype), normed)
        bias_sum = grad_normed.sum(1, keepdim=True)
        weight_sum = torch.mul(grad_normed, x_hat, out=normed).sum(1, keepdim=True)
        grad_x = grad_shift = None
        if need_x or need_shift:
            mean_grad = _group_mean(bias_sum * scale, ctx.num_groups) / length
            mean_grad_x_hat = _group_mean(weight_sum * scale, ctx.num_groups) / length
            grad_x = grad_normed.mul_(scale).sub_(mean_grad)
            grad_x = grad_x.addcmul_(x_hat, mean_grad_x_hat, value=-1).mul_(rstd)
            grad_shift = grad_x.sum(1).to(ctx.shift_dtype) if need_shift else None
            grad_x = grad_x.to(x.dtype) if need_x else None
        weight_sum, bias_sum = weight_sum.sum((0, 1)), bias_sum.sum((0, 1))
        return grad_x, None, weight_sum.to(weight.dtype), bias_sum.to(bias.dtype), grad_shift, None
