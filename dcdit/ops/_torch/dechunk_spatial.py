"""Spatial de-chunking: smooth the kept tokens over a window, then each position takes its nearest kept token."""

import torch
from torch import Tensor

from dcdit.ops._torch.clamped_prob import packed_clamped_prob
from dcdit.ops._torch.nearest import nearest_kept
from dcdit.ops._torch.smoothing import smooth
from dcdit.ops._torch.upsample import upsample_rows
from dcdit.ops.numerics import upcast, widest, window_radius
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
    images, length = p.shape
    dtype = widest(h, residual)
    tokens = upcast(h.to(dtype))
    packed_rows = sel.packed_rows.reshape(images, *grid)
    radius = window_radius(sigma, sel.prob_floor, tokens.dtype)
    smoothed = smooth(tokens, packed_clamped_prob(p, sel, tokens.dtype), packed_rows, sel.indices, radius, sigma)
    nearest = nearest_kept(packed_rows >= 0).view(images, length)
    nearest_row = torch.where(nearest < 0, -1, sel.packed_rows.long().gather(1, nearest.clamp(min=0)))
    out = upsample_rows(
        smoothed,
        nearest_row.flatten(),
        None if gate is None else gate.reshape(-1),
        None if residual is None else residual.reshape(-1, h.shape[1]),
        dtype,
    )
    return out.view(images, length, h.shape[1])
