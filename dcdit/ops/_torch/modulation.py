"""adaLN modulation of packed rows by a (B, D) table.

Where segment bounds can be read for free, one pass per segment with its row of the table held in cache. Elsewhere the
rows look up a table that has one zero row more, for padding rows: they come out as 0 (norm) or unchanged (gated add).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dcdit.ops._torch.rows import reads_are_free, segment_of_rows
from dcdit.ops._torch.segments import SegmentGatedAdd, SegmentLayerNorm
from dcdit.ops.numerics import upcast


def modulated_layer_norm(t: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor, eps: float) -> Tensor:
    if reads_are_free(t):
        return SegmentLayerNorm.apply(t, shift, scale, cu_seqlens.tolist(), eps)
    segment = segment_of_rows(cu_seqlens, t.shape[0])
    normed = F.layer_norm(_without_padding(t, segment, cu_seqlens), t.shape[-1:], eps=eps)
    return torch.addcmul(_rows(shift, segment), normed, 1 + _rows(scale, segment)).to(t.dtype)


def gated_add(x: Tensor, y: Tensor, gate: Tensor, cu_seqlens: Tensor) -> Tensor:
    if reads_are_free(x):
        return SegmentGatedAdd.apply(x, y, gate, cu_seqlens.tolist())
    segment = segment_of_rows(cu_seqlens, x.shape[0])
    return torch.addcmul(upcast(x), _rows(gate, segment), _without_padding(y, segment, cu_seqlens)).to(x.dtype)


def gated_add_modulated_layer_norm(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    added = gated_add(x, y, gate, cu_seqlens)
    return added, modulated_layer_norm(added, shift, scale, cu_seqlens, eps)


def _rows(table: Tensor, segment: Tensor) -> Tensor:
    return F.pad(upcast(table), (0, 0, 0, 1)).index_select(0, segment)


def _without_padding(t: Tensor, segment: Tensor, cu_seqlens: Tensor) -> Tensor:
    return torch.where((segment < cu_seqlens.shape[0] - 1)[:, None], upcast(t), 0)
