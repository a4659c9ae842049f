"""EMA de-chunking on Triton kernels."""

from typing import Any

import torch
from torch import Tensor

from dcdit.kernels import dechunk_ema as kernels
from dcdit.ops._triton.kernel_op import KernelOp, unit_stride
from dcdit.ops.numerics import widest
from dcdit.ops.token_selection import TokenSelection


def dechunk_ema(h: Tensor, p: Tensor, sel: TokenSelection, gate: Tensor | None, residual: Tensor | None) -> Tensor:
    d = h.shape[1]
    rows = None if residual is None else unit_stride(residual.reshape(-1, d))
    source = None if sel.source_cu_seqlens is None else sel.source_cu_seqlens.contiguous()
    token_map = kernels.TokenMap(sel.packed_rows.contiguous(), sel.cu_seqlens.contiguous(), source)
    return _dechunk(unit_stride(h), p.contiguous(), gate, rows, token_map).view(*p.shape, d)


def _forward(h: Tensor, p: Tensor, gate: Tensor | None, residual: Tensor | None, token_map: kernels.TokenMap) -> Tensor:
    # The gate leaves the value as it is. It is an argument for its gradient.
    return kernels.dechunk_ema_fwd(h, p, residual, token_map)


def _fake(h: Tensor, p: Tensor, gate: Tensor | None, residual: Tensor | None, token_map: kernels.TokenMap) -> Tensor:
    return h.new_empty(p.numel(), h.shape[1], dtype=widest(h, residual))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    h, p, gate, residual, token_map = inputs
    ctx.gate_dtype = None if gate is None else gate.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.save_for_backward(h, p, *token_map)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    want_h, want_p, want_gate, want_residual, *_ = ctx.needs_input_grad
    grad_residual = grad.to(ctx.residual_dtype) if want_residual else None
    if not (want_h or want_p or want_gate):
        return None, None, None, grad_residual, None
    h, p, *token_map = ctx.saved_tensors
    grad_h, grad_p, grad_gate = _gradients(
        unit_stride(grad), h, p, kernels.TokenMap(*token_map), want_h, want_p, want_gate
    )
    return (
        grad_h if want_h else None,
        grad_p if want_p else None,
        grad_gate.to(ctx.gate_dtype) if want_gate else None,
        grad_residual,
        None,
    )


def _gradients_fake(
    grad: Tensor, h: Tensor, p: Tensor, token_map: kernels.TokenMap, want_h: bool, want_p: bool, want_gate: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (
        h.new_empty(h.shape) if want_h else None,
        p.new_empty(p.shape) if want_p else None,
        p.new_empty(p.shape, dtype=torch.float32) if want_gate else None,
    )


_gradients = KernelOp("dechunk_ema_bwd", kernels.dechunk_ema_bwd, _gradients_fake)
_dechunk = KernelOp("dechunk_ema", _forward, _fake).differentiate(_setup, _backward)
