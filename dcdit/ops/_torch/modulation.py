"""adaLN modulation of packed rows by (B, D) tables.

Where the bounds of the segments can be read for free, each segment is one pass with its row of the table. Elsewhere
each packed row looks up its row of the table. The table then gets one zero row more, for the padding rows: they come
out as 0 (norm) or unchanged (gated add).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dcdit.ops._torch import host_reads
from dcdit.ops._torch.segment_modulation import SegmentGatedAdd, SegmentNorm
from dcdit.ops._torch.segments import segment_of_rows
from dcdit.ops.affine import fold_affine
from dcdit.ops.autograd import apply
from dcdit.ops.numerics import upcast_all, widest


def modulated_layer_norm(
    t: Tensor,
    shift: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor,
    eps: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    return _modulated_norm(t, shift, scale, cu_seqlens, eps, weight, bias, False)


def modulated_rms_norm(
    t: Tensor, shift: Tensor | None, scale: Tensor, cu_seqlens: Tensor, eps: float, weight: Tensor | None
) -> Tensor:
    return _modulated_norm(t, shift, scale, cu_seqlens, eps, weight, None, True)


def _modulated_norm(
    t: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    cu_seqlens: Tensor,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    rms: bool,
) -> Tensor:
    whole = weight is not None or bias is not None
    if whole:
        shift, scale = fold_affine(shift, scale, weight, bias)
    if shift is None:
        shift = torch.zeros_like(scale)
    if host_reads.reads_are_free(t):
        normed, *_ = apply(SegmentNorm, t, shift, scale, cu_seqlens.tolist(), eps, rms, whole)
        return normed
    segment = segment_of_rows(cu_seqlens, t.shape[0])
    tokens, shift, scale = upcast_all(t, shift, scale)
    tokens, factor = _without_padding(tokens, segment, cu_seqlens), scale if whole else 1 + scale
    if rms:
        normed = tokens * torch.rsqrt((tokens * tokens).mean(-1, keepdim=True) + eps)
    else:
        normed = F.layer_norm(tokens, t.shape[-1:], eps=eps)
    return torch.addcmul(_rows(shift, segment), normed, _rows(factor, segment)).to(t.dtype)


def gated_add(x: Tensor, y: Tensor, gate: Tensor, cu_seqlens: Tensor) -> Tensor:
    if host_reads.reads_are_free(x):
        return apply(SegmentGatedAdd, x, y, gate, cu_seqlens.tolist())
    segment, dtype = segment_of_rows(cu_seqlens, x.shape[0]), widest(x, y)
    x, y, gate = upcast_all(x, y, gate)
    return torch.addcmul(x, _rows(gate, segment), _without_padding(y, segment, cu_seqlens)).to(dtype)


def gated_add_modulated_layer_norm(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    added = gated_add(x, y, gate, cu_seqlens)
    return added, modulated_layer_norm(added, shift, scale, cu_seqlens, eps)


def _rows(table: Tensor, segment: Tensor) -> Tensor:
    """(T, D): the row of the table (B, D) for each packed row, 0 for padding rows."""
    return F.pad(table, (0, 0, 0, 1)).index_select(0, segment)


def _without_padding(t: Tensor, segment: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(T, D): t with zeros in its padding rows, which may hold anything."""
    return torch.where((segment < cu_seqlens.shape[0] - 1)[:, None], t, 0)
