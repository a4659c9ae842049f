"""Spatial de-chunking on Triton kernels."""

from typing import Any

import torch
from torch import Tensor

from dcdit.kernels import dechunk_spatial as kernels
from dcdit.ops._triton.kernel_op import KernelOp, unit_stride, wants_gradient
from dcdit.ops._triton.nested import save, saved
from dcdit.ops.numerics import widest, window_radius
from dcdit.ops.token_selection import TokenSelection


def dechunk_spatial(
    h: Tensor,
    p: Tensor,
    sel: TokenSelection,
    grid: tuple[int, int],
    sigma: float,
    gate: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    rows = None if residual is None else unit_stride(residual.reshape(-1, h.shape[1]))
    geometry = kernels.Geometry(
        sel.packed_rows.contiguous(), sel.cu_seqlens.contiguous(), grid, sigma, window_radius(sigma, sel.prob_floor)
    )
    if wants_gradient(h, p, gate, rows):
        out, *_ = _dechunk(unit_stride(h), p.contiguous(), gate, rows, geometry)
    else:
        out = _inference(unit_stride(h), p.contiguous(), rows, geometry)
    return out.view(*p.shape, h.shape[1])


def _forward(
    h: Tensor, p: Tensor, gate: Tensor | None, residual: Tensor | None, geometry: kernels.Geometry
) -> tuple[Tensor, kernels.Saved]:
    # The gate leaves the value as it is. It is an argument for its gradient.
    return kernels.dechunk_spatial_fwd(h, p, residual, geometry)


def _fake(
    h: Tensor, p: Tensor, gate: Tensor | None, residual: Tensor | None, geometry: kernels.Geometry
) -> tuple[Tensor, kernels.Saved]:
    (tokens, d), images, (height, width) = h.shape, p.shape[0], geometry.grid

    def ints(*shape: int) -> Tensor:
        return h.new_empty(shape, dtype=torch.int32)

    def floats(*shape: int) -> Tensor:
        return h.new_empty(shape, dtype=torch.float32)

    index = kernels.KeptIndex(
        prefix_count=ints(images * height, width + 1),
        row=ints(tokens),
        col=ints(tokens),
        clamped_prob=floats(tokens),
    )
    left = kernels.Saved(h_minus_s=floats(tokens, d), c=floats(tokens), nearest=ints(p.numel()), index=index)
    return h.new_empty(p.numel(), d, dtype=widest(h, residual)), left


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, kernels.Saved]) -> None:
    h, p, gate, residual, geometry = inputs
    _, left = output
    ctx.gate_dtype = None if gate is None else gate.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype
    save(ctx, h, p, geometry, left)


def _backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    want_h, want_p, want_gate, want_residual, *_ = ctx.needs_input_grad
    grad_h = grad_p = grad_gate = None
    if grad is not None and (want_h or want_p or want_gate):
        gate_dtype = ctx.gate_dtype if want_gate else None
        grad_h, grad_p, grad_gate = _gradients(grad.contiguous(), *saved(ctx), want_h, want_p, gate_dtype)
    return (
        grad_h if want_h else None,
        grad_p if want_p else None,
        grad_gate if want_gate else None,
        grad.to(ctx.residual_dtype) if want_residual and grad is not None else None,
        None,
    )


def _gradients_fake(
    grad: Tensor, h: Tensor, p: Tensor, geometry: kernels.Geometry, left: kernels.Saved,
    want_h: bool, want_p: bool, gate_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    return (
        h.new_empty(h.shape) if want_h else None,
        p.new_empty(p.shape) if want_p else None,
        None if gate_dtype is None else p.new_empty(p.shape, dtype=gate_dtype),
    )


def _inference_fake(h: Tensor, p: Tensor, residual: Tensor | None, geometry: kernels.Geometry) -> Tensor:
    return h.new_empty(p.numel(), h.shape[1], dtype=widest(h, residual))


_inference = KernelOp("dechunk_spatial_inference", kernels.dechunk_spatial_inference, _inference_fake)
_gradients = KernelOp("dechunk_spatial_bwd", kernels.dechunk_spatial_bwd, _gradients_fake)
_dechunk = KernelOp("dechunk_spatial", _forward, _fake).differentiate(_setup, _backward)
