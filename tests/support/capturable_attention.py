"""Packed attention that never reads lengths on the host, as the GPU kernels: a stand-in for them on CPU tensors."""

import pytest
import torch
from torch import Tensor

from dcdit.ops import unchecked


def install(monkeypatch: pytest.MonkeyPatch, longest: int) -> None:
    """Replace the blocks' attention. Every image takes ``longest`` rows, so no result depends on other lengths."""

    def attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, padding: bool, zero_padding: bool) -> Tensor:
        packed_rows, (q, k, v) = qkv.shape[0], qkv.unbind(1)
        lengths, place = cu_seqlens.diff(), torch.arange(longest, device=q.device)
        real = place < lengths[:, None]  # (B, longest)
        rows = torch.where(real, cu_seqlens[:-1, None] + place, 0)
        q, k, v = (x.index_select(0, rows.flatten()).unflatten(0, rows.shape).transpose(1, 2) for x in (q, k, v))
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~real[:, None, None, :], -1e30)
        dense = (scores.softmax(-1) @ v).transpose(1, 2).flatten(0, 1)  # (B * longest, heads, d)
        spare = max(packed_rows, dense.shape[0])
        out = dense.new_zeros(spare + 1, *dense.shape[1:])
        return out.index_copy(0, torch.where(real, rows, spare).flatten(), dense)[:packed_rows]

    monkeypatch.setattr(unchecked, "self_attention", attention)
