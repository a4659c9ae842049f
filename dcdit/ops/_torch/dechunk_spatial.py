"""Spatial de-chunking: windowed smoothing of the kept tokens, then nearest-token plug-back."""

import torch
from torch import Tensor

from dcdit.ops._torch.confidence import packed_confidence
from dcdit.ops._torch.nearest import nearest_kept
from dcdit.ops._torch.smoothing import smooth
from dcdit.ops._torch.spread import spread_rows
from dcdit.ops.numerics import upcast, window_radius
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
    tokens = upcast(h)
    packed_rows = sel.packed_rows.view(images, *grid)
    radius = window_radius(sigma, sel.prob_floor, tokens.dtype)
    smoothed = smooth(tokens, packed_confidence(p, sel, tokens.dtype), packed_rows, sel.indices, radius, sigma)
    nearest = nearest_kept(packed_rows >= 0).view(images, length)
    owner = torch.where(nearest < 0, -1, sel.packed_rows.long().gather(1, nearest.clamp(min=0)))
    out = spread_rows(
        smoothed,
        owner.flatten(),
        None if gate is None else gate.reshape(-1),
        None if residual is None else residual.reshape(-1, h.shape[1]),
        h.dtype,
    )
    return out.view(images, length, h.shape[1])
