"""adaLN modulation of packed rows by a (B, D) table.

The table gets one zero row more, which slack rows look up: they come out as 0 (norm) or unchanged (gated add).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dcdit.ops._torch._common import segment_of_rows, wide


def modulated_layer_norm(t: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor, eps: float) -> Tensor:
    segment = segment_of_rows(cu_seqlens, t.shape[0])
    normed = F.layer_norm(_without_slack(t, segment, cu_seqlens), t.shape[-1:], eps=eps)
    return torch.addcmul(_rows(shift, segment), normed, 1 + _rows(scale, segment)).to(t.dtype)


def gated_add(x: Tensor, y: Tensor, gate: Tensor, cu_seqlens: Tensor) -> Tensor:
    segment = segment_of_rows(cu_seqlens, x.shape[0])
    return torch.addcmul(wide(x), _rows(gate, segment), _without_slack(y, segment, cu_seqlens)).to(x.dtype)


def gated_add_modulated_layer_norm(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    added = gated_add(x, y, gate, cu_seqlens)
    return added, modulated_layer_norm(added, shift, scale, cu_seqlens, eps)


def _rows(table: Tensor, segment: Tensor) -> Tensor:
    return F.pad(wide(table), (0, 0, 0, 1)).index_select(0, segment)


def _without_slack(t: Tensor, segment: Tensor, cu_seqlens: Tensor) -> Tensor:
    return torch.where((segment < cu_seqlens.shape[0] - 1)[:, None], wide(t), 0)
