"""EMA de-chunking on Triton kernels."""

from typing import Any

import torch
from torch import Tensor

from dcdit.kernels import dechunk_ema as kernels
from dcdit.ops._triton.kernel_op import KernelOp, unit_stride
from dcdit.ops.token_selection import TokenSelection


def dechunk_ema(h: Tensor, p: Tensor, sel: TokenSelection, gate: Tensor | None, residual: Tensor | None) -> Tensor:
    d = h.shape[1]
    rows = None if residual is None else unit_stride(residual.reshape(-1, d))
    source = None if sel.source_cu_seqlens is None else sel.source_cu_seqlens.contiguous()
    out = _ema(
        unit_stride(h), p.contiguous(), sel.packed_rows.contiguous(), sel.cu_seqlens.contiguous(), source, gate, rows
    )
    return out.view(*p.shape, d)


def _forward(
    h: Tensor,
    p: Tensor,
    packed_rows: Tensor,
    cu_seqlens: Tensor,
    source_cu_seqlens: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    # The gate leaves the value as it is; it is an argument for its gradient's sake.
    return kernels.dechunk_ema_fwd(h, p, packed_rows, source_cu_seqlens, residual)


def _forward_fake(
    h: Tensor,
    p: Tensor,
    packed_rows: Tensor,
    cu_seqlens: Tensor,
    source_cu_seqlens: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    return h.new_empty(p.numel(), h.shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    h, p, packed_rows, cu_seqlens, source_cu_seqlens, gate, _ = inputs
    ctx.gate_dtype = None if gate is None else gate.dtype
    ctx.save_for_backward(h, p, packed_rows, cu_seqlens, source_cu_seqlens)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    want_h, want_p, *_, want_gate, want_residual = ctx.needs_input_grad
    if not (want_h or want_p or want_gate):
        return None, None, None, None, None, None, grad
    grad_h, grad_p, grad_gate = _gradients(unit_stride(grad), *ctx.saved_tensors, want_h, want_p, want_gate)
    return (
        grad_h if want_h else None,
        grad_p if want_p else None,
        None,
        None,
        None,
        grad_gate.to(ctx.gate_dtype) if want_gate else None,
        grad if want_residual else None,
    )


def _gradients_fake(
    grad: Tensor,
    h: Tensor,
    p: Tensor,
    packed_rows: Tensor,
    cu_seqlens: Tensor,
    source_cu_seqlens: Tensor | None,
    want_h: bool,
    want_p: bool,
    want_gate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        h.new_empty(h.shape if want_h else (0,)),
        p.new_empty(p.shape if want_p else (0,)),
        p.new_empty(p.shape if want_gate else (0,), dtype=torch.float32),
    )


_gradients = KernelOp("dechunk_ema_bwd", kernels.dechunk_ema_bwd, _gradients_fake)
_ema = KernelOp("dechunk_ema", _forward, _forward_fake).differentiate(_setup, _backward)
