"""Spatial de-chunking on Triton kernels."""

from typing import Any

import torch
from torch import Tensor

from dcdit.kernels import dechunk_spatial as kernels
from dcdit.ops._triton.kernel_op import KernelOp, unit_stride
from dcdit.ops.numerics import window_radius
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
    out = _dechunk(
        unit_stride(h), p.contiguous(), sel.packed_rows.contiguous(), sel.cu_seqlens.contiguous(), gate, rows,
        *grid, sigma, window_radius(sigma, sel.prob_floor),
    )[0]  # fmt: skip
    return out.view(*p.shape, h.shape[1])


def _launch(
    h: Tensor, p: Tensor, packed_rows: Tensor, cu_seqlens: Tensor, gate: Tensor | None, residual: Tensor | None,
    height: int, width: int, sigma: float, radius: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    out, saved = kernels.dechunk_spatial_fwd(h, p, packed_rows, residual, (height, width), sigma, radius)
    return out, *saved


def _fake(
    h: Tensor, p: Tensor, packed_rows: Tensor, cu_seqlens: Tensor, gate: Tensor | None, residual: Tensor | None,
    height: int, width: int, sigma: float, radius: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tokens, positions = h.shape[0], p.numel()

    def whole(*shape: int) -> Tensor:
        return h.new_empty(shape, dtype=torch.int32)

    def real(*shape: int) -> Tensor:
        return h.new_empty(shape, dtype=torch.float32)

    saved = kernels.Saved(
        detail=real(tokens, h.shape[1]),
        scale=real(tokens),
        nearest=whole(positions),
        rank=whole(p.shape[0] * height, width + 1),
        row=whole(tokens),
        col=whole(tokens),
        confidence=real(tokens),
    )
    return h.new_empty(positions, h.shape[1]), *saved


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h, p, packed_rows, cu_seqlens, gate, _, *ctx.settings = inputs
    saved = output[1:]
    ctx.mark_non_differentiable(*saved)
    # Spares the zeros that would stand for the gradients of the saved tensors.
    ctx.set_materialize_grads(False)
    ctx.gate_dtype = None if gate is None else gate.dtype
    ctx.save_for_backward(h, p, packed_rows, cu_seqlens, *saved)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    want_h, want_p, _, _, want_gate, want_residual = ctx.needs_input_grad[:6]
    if grad is None:
        return (None,) * len(ctx.needs_input_grad)
    grad_h = grad_p = grad_gate = None
    if want_h or want_p or want_gate:
        gate_dtype = ctx.gate_dtype if want_gate else None
        grad_h, grad_p, grad_gate = _gradients(
            grad.contiguous(), *ctx.saved_tensors, *ctx.settings, want_h, want_p, gate_dtype
        )
    return (
        grad_h if want_h else None,
        grad_p if want_p else None,
        None,
        None,
        grad_gate if want_gate else None,
        grad if want_residual else None,
        *(None for _ in ctx.settings),
    )


def _backward_launch(
    grad: Tensor, h: Tensor, p: Tensor, packed_rows: Tensor, cu_seqlens: Tensor, detail: Tensor, scale: Tensor,
    nearest: Tensor, rank: Tensor, row: Tensor, col: Tensor, confidence: Tensor,
    height: int, width: int, sigma: float, radius: int, want_h: bool, want_p: bool, gate_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    saved = kernels.Saved(detail, scale, nearest, rank, row, col, confidence)
    grads = kernels.dechunk_spatial_bwd(
        grad, h, p, packed_rows, cu_seqlens, saved, (height, width), sigma, radius, want_h, want_p, gate_dtype
    )
    grad_h, grad_p, grad_gate = (h.new_empty(0) if g is None else g for g in grads)
    return grad_h, grad_p, grad_gate


def _backward_fake(
    grad: Tensor, h: Tensor, p: Tensor, packed_rows: Tensor, cu_seqlens: Tensor, detail: Tensor, scale: Tensor,
    nearest: Tensor, rank: Tensor, row: Tensor, col: Tensor, confidence: Tensor,
    height: int, width: int, sigma: float, radius: int, want_h: bool, want_p: bool, gate_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        h.new_empty(h.shape if want_h else (0,)),
        p.new_empty(p.shape) if want_p else h.new_empty(0),
        h.new_empty(0) if gate_dtype is None else p.new_empty(p.shape, dtype=gate_dtype),
    )


_gradients = KernelOp("dechunk_spatial_bwd", _backward_launch, _backward_fake)
_dechunk = KernelOp("dechunk_spatial", _launch, _fake).differentiate(_setup, _backward)
