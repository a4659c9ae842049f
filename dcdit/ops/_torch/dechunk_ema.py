"""EMA de-chunking: a log-depth scan over (decay, value) pairs that restarts at every sequence."""

import torch
from torch import Tensor

from dcdit.ops._torch._common import PROB_EPS, wide
from dcdit.ops._torch.dechunk_spatial import gate_and_residual
from dcdit.ops._torch.packing import _GatherRows
from dcdit.ops.selection import TokenSelection


def dechunk_ema(h: Tensor, p: Tensor, sel: TokenSelection, gate: Tensor | None, residual: Tensor | None) -> Tensor:
    tokens = torch.where((sel.indices >= 0)[:, None], wide(h), 0)
    q = wide(p).clamp(PROB_EPS, 1 - PROB_EPS).to(tokens.dtype).reshape(-1, 1)
    q = _GatherRows.apply(q, sel.indices)
    first = torch.zeros(tokens.shape[0] + 1, 1, dtype=torch.bool, device=h.device)
    first[sel.cu_seqlens.long()] = True
    decay = (1 - q).masked_fill(first[:-1], 0.0)
    state = q * tokens
    step = 1
    while step < tokens.shape[0]:
        state = torch.cat([state[:step], state[step:] + decay[step:] * state[:-step]])
        decay = torch.cat([decay[:step], decay[step:] * decay[:-step]])
        step *= 2
    hold = sel.mask.flatten().cumsum(0) - 1
    if sel.source_cu_seqlens is None:
        start = sel.cu_seqlens[:-1].repeat_interleave(p.shape[-1], output_size=p.numel())
    else:
        start = sel.cu_seqlens[:-1].repeat_interleave(sel.source_cu_seqlens.diff(), output_size=p.numel())
    hold = torch.where(hold < start, -1, hold)
    grown = _hold(state, hold).view(*p.shape, -1)
    return gate_and_residual(grown, gate, residual, h.dtype)


def _hold(state: Tensor, hold: Tensor) -> Tensor:
    padded = torch.cat([state, state.new_zeros(1, state.shape[1])])
    return padded.index_select(0, torch.where(hold < 0, state.shape[0], hold))
