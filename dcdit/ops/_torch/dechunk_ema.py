"""EMA de-chunking: a scan over the kept tokens of each sequence, then each position takes the last state so far."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dcdit.ops._torch.clamped_prob import packed_clamped_prob
from dcdit.ops._torch.custom_op import as_custom_op
from dcdit.ops._torch.segments import may_have_padding
from dcdit.ops._torch.upsample import upsample_rows
from dcdit.ops.autograd import apply, first_derivative_only
from dcdit.ops.numerics import upcast, widest
from dcdit.ops.token_selection import TokenSelection

BLOCK = 16
"""Rows that one triangular product scans."""


def dechunk_ema(h: Tensor, p: Tensor, sel: TokenSelection, gate: Tensor | None, residual: Tensor | None) -> Tensor:
    dtype = widest(h, residual)
    tokens = upcast(h.to(dtype))
    if may_have_padding(sel.cu_seqlens, tokens.shape[0]):
        tokens = torch.where((sel.indices >= 0)[:, None], tokens, 0)
    q = packed_clamped_prob(p, sel, tokens.dtype)
    decay = (1 - q).masked_fill(_first_rows(sel.cu_seqlens, tokens.shape[0]), 0)
    out = upsample_rows(
        apply(_Scan, tokens, q, decay),
        _last_kept(sel),
        None if gate is None else gate.reshape(-1),
        None if residual is None else residual.reshape(-1, h.shape[1]),
        dtype,
    )
    return out.view(*p.shape, h.shape[1])


def _first_rows(cu_seqlens: Tensor, total: int) -> Tensor:
    """(total,) bool: whether a packed row is the first of its segment."""
    flags = torch.zeros(total + 1, dtype=torch.bool, device=cu_seqlens.device)
    return flags.index_fill(0, cu_seqlens.long(), True)[:total]


def _last_kept(sel: TokenSelection) -> Tensor:
    """(S,) int64: packed row of the last kept token at or before each position of its sequence, -1 before the first."""
    kept_so_far = (sel.packed_rows >= 0).flatten().cumsum(0)
    if sel.source_cu_seqlens is None:
        first_row = sel.cu_seqlens[:-1, None].expand(sel.mask.shape).reshape(-1)
    else:
        sizes = sel.source_cu_seqlens.diff()
        first_row = sel.cu_seqlens[:-1].repeat_interleave(sizes, output_size=sel.mask.numel())
    return torch.where(kept_so_far > first_row, kept_so_far - 1, -1)


class _Scan(torch.autograd.Function):
    """``s_m = decay_m s_{m-1} + q_m h_m``, starting from 0; h (T, D), q and decay (T,)."""

    @staticmethod
    def forward(h: Tensor, q: Tensor, decay: Tensor) -> Tensor:
        return _scan(h, q, decay)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, q, decay, state = ctx.saved_tensors
        # The adjoint is the same scan from the end: a_m = g_m + decay_{m+1} a_{m+1}.
        # (Written without roll, which the compiler cannot trace for a number of rows that depends on data.)
        later_decay = torch.cat([decay[1:], decay[:1]])
        adjoint = _scan(grad.flip(0), torch.ones_like(q), later_decay.flip(0)).flip(0)
        grad_decay = torch.zeros_like(decay)
        grad_decay[1:] = (adjoint[1:] * state[:-1]).sum(-1)
        return adjoint * q[:, None], (adjoint * h).sum(-1), grad_decay


def _scan_fake(x: Tensor, scale: Tensor, decay: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@as_custom_op(_scan_fake)
def _scan(x: Tensor, scale: Tensor, decay: Tensor) -> Tensor:
    """``s_m = decay_m s_{m-1} + scale_m x_m``: one lower-triangular product per block, then a scan of the block ends.

    Weights are products of decays. No ratio of two long products is taken, which could underflow or overflow.
    """
    total, width = x.shape
    if total == 0:
        return x.new_empty(x.shape)
    missing = -total % BLOCK
    if missing:
        x, scale, decay = F.pad(x, (0, 0, 0, missing)), F.pad(scale, (0, missing)), F.pad(decay, (0, missing))
    x, decay = x.reshape(-1, BLOCK, width), decay.reshape(-1, BLOCK)
    # weight[m, i] = scale_i * decay_{i+1} ... decay_m
    later = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=x.device).tril(-1)
    weight = torch.where(later, decay[:, :, None], 1).cumprod(1).tril() * scale.reshape(-1, 1, BLOCK)
    out = torch.bmm(weight, x)
    if out.shape[0] > 1:
        since_start = decay.cumprod(1)
        carry = _scan(out[:, -1], torch.ones_like(since_start[:, 0]), since_start[:, -1])
        out[1:].baddbmm_(since_start[1:, :, None], carry[:-1, None])
    return out.view(-1, width)[:total]
