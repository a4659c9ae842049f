"""Boundary probabilities on Triton kernels."""

from typing import Any

import torch
from torch import Tensor

from dcdit.kernels import boundary_cosine, boundary_cosine2d, boundary_predictability
from dcdit.ops._triton.kernel_op import KernelOp, unit_stride, without_gradient


def boundary_prob_cosine(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    starts = None if cu_seqlens is None else cu_seqlens.contiguous()
    return _cosine(_rows(q), _rows(k), starts, q.shape[-2]).view(q.shape[:-1])


def boundary_prob_cosine2d(q: Tensor, k: Tensor, weight: Tensor, grid: tuple[int, int]) -> Tensor:
    # (9, D): the kernels read all weights of one neighbour together. Autograd reshapes the gradient back.
    taps = weight.reshape(-1, 9).t().contiguous()
    p, _ = _cosine2d(_rows(q), _rows(k), taps, *grid)
    return p.view(q.shape[:-1])


def boundary_prob_predictability(
    features: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    num_groups: int,
    eps: float,
) -> Tensor:
    x = features.flatten(2)
    if x.stride(1) != 1 and x.stride(2) != 1:
        x = x.contiguous()
    p, _ = _predictability(
        x, norm_weight.contiguous(), norm_bias.contiguous(), out_weight.contiguous(), out_bias, num_groups, eps
    )
    # The backward reads p. A copy may be changed in place before that.
    return p.clone() if p.requires_grad else p


def _rows(x: Tensor) -> Tensor:
    return unit_stride(x.reshape(-1, x.shape[-1]))


# --- sequence -----------------------------------------------------------------------------------------------------


def _cosine_fake(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, length: int) -> Tensor:
    return q.new_empty(q.shape[0], dtype=torch.float32)


def _cosine_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, cu_seqlens, ctx.length = inputs
    ctx.save_for_backward(q, k, cu_seqlens)


def _cosine_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, cu_seqlens = ctx.saved_tensors
    need_q, need_k = ctx.needs_input_grad[:2]
    grad_q, grad_k = _cosine_grad(grad.contiguous(), q, k, cu_seqlens, ctx.length, need_q, need_k)
    return grad_q if need_q else None, grad_k if need_k else None, None, None


def _cosine_grad_fake(
    grad: Tensor, q: Tensor, k: Tensor, cu_seqlens: Tensor | None, length: int, need_q: bool, need_k: bool
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape if need_q else (0,)), k.new_empty(k.shape if need_k else (0,))


_cosine_grad = KernelOp("boundary_prob_cosine_bwd", boundary_cosine.cosine_bwd, _cosine_grad_fake)
_cosine = KernelOp("boundary_prob_cosine", boundary_cosine.cosine_fwd, _cosine_fake)
_cosine.differentiate(_cosine_setup, _cosine_backward)


# --- grid ---------------------------------------------------------------------------------------------------------


def _cosine2d_fake(q: Tensor, k: Tensor, weight: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    rows = q.shape[0]
    return (
        q.new_empty(rows, dtype=torch.float32),
        q.new_empty((boundary_cosine2d.PLANES, rows), dtype=torch.float32),
    )


def _cosine2d_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, weight, ctx.height, ctx.width = inputs
    without_gradient(ctx, output[1])
    ctx.save_for_backward(q, k, weight, output[1])


def _cosine2d_backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    grads = _cosine2d_grad(grad.contiguous(), *ctx.saved_tensors, ctx.height, ctx.width, *needs)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None


def _cosine2d_grad_fake(
    grad: Tensor, q: Tensor, k: Tensor, weight: Tensor, stats: Tensor, height: int, width: int,
    need_q: bool, need_k: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        q.new_empty(q.shape if need_q else (0,)),
        k.new_empty(k.shape if need_k else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
    )


_cosine2d_grad = KernelOp("boundary_prob_cosine2d_bwd", boundary_cosine2d.cosine2d_bwd, _cosine2d_grad_fake)
_cosine2d = KernelOp("boundary_prob_cosine2d", boundary_cosine2d.cosine2d_fwd, _cosine2d_fake)
_cosine2d.differentiate(_cosine2d_setup, _cosine2d_backward)


# --- predictability -----------------------------------------------------------------------------------------------


def _predictability_fake(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, out_weight: Tensor, out_bias: Tensor, num_groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    images, _, length = x.shape
    return (
        x.new_empty((images, length), dtype=torch.float32),
        x.new_empty((images, 2, num_groups), dtype=torch.float32),
    )


def _predictability_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, norm_weight, norm_bias, out_weight, out_bias, _, _ = inputs
    p, stats = output
    without_gradient(ctx, stats)
    ctx.save_for_backward(x, norm_weight, norm_bias, out_weight, p, stats)
    ctx.dtypes = [parameter.dtype for parameter in (norm_weight, norm_bias, out_weight, out_bias)]


def _predictability_backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:5]
    grad_x, sums, bias_sum = _predictability_grad(grad.contiguous(), *ctx.saved_tensors, needs[0])
    parameters = (value.to(dtype) for value, dtype in zip((*sums.unbind(), bias_sum), ctx.dtypes, strict=True))
    return *(g if need else None for g, need in zip((grad_x, *parameters), needs, strict=True)), None, None


def _predictability_grad_fake(
    grad: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, out_weight: Tensor, p: Tensor, stats: Tensor,
    need_features: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if need_features:
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        if x.stride(1) == 1:
            grad_x = x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)
    else:
        grad_x = x.new_empty(0)
    return grad_x, x.new_empty((3, x.shape[1]), dtype=torch.float32), x.new_empty((), dtype=torch.float32)


_predictability_grad = KernelOp(
    "boundary_prob_predictability_bwd", boundary_predictability.predictability_bwd, _predictability_grad_fake
)
_predictability = KernelOp(
    "boundary_prob_predictability", boundary_predictability.predictability_fwd, _predictability_fake
).differentiate(_predictability_setup, _predictability_backward)
