"""Spatial de-chunking: truncated separable smoothing and nearest-token plug-back."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dcdit.ops._torch._common import PROB_EPS, ROW_EPS, wide
from dcdit.ops._torch.nearest import nearest_kept
from dcdit.ops._torch.packing import _GatherRows, _ScatterRows
from dcdit.ops.selection import TokenSelection


def dechunk_spatial(
    h: Tensor,
    p: Tensor,
    sel: TokenSelection,
    grid: tuple[int, int],
    sigma: float,
    gate: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    tokens = wide(h)
    q = wide(p).clamp(PROB_EPS, 1 - PROB_EPS).to(tokens.dtype).reshape(-1, 1)
    q = _GatherRows.apply(q, sel.indices)
    images = sel.mask.shape[0]
    radius = math.ceil((6 if sel.prob_floor >= 0.5 else 8) * sigma)
    stacked = torch.cat([tokens * q, q], 1)
    image = _ScatterRows.apply(stacked, sel.indices, sel.mask.numel(), 0.0).view(images, *grid, -1)
    for axis in (1, 2):
        image = _blur(image, axis, radius, sigma)
    blurred = _GatherRows.apply(image.flatten(0, 2), sel.indices)
    smoothed = blurred[:, :-1] / (blurred[:, -1:] + ROW_EPS)
    rows = q * tokens + (1 - q) * smoothed
    owner = nearest_kept(sel.mask, grid) + torch.arange(images, device=h.device)[:, None] * sel.mask[0].numel()
    packed = sel.mask.flatten().cumsum(0) - 1
    grown = rows.index_select(0, packed[owner.flatten()]).view(*p.shape, -1)
    return gate_and_residual(grown, gate, residual, h.dtype)


def _blur(image: Tensor, axis: int, radius: int, sigma: float) -> Tensor:
    radius = min(radius, image.shape[axis] - 1)
    padding = [0, 0] * (image.dim() - 1 - axis) + [radius, radius]
    padded = F.pad(image, padding)
    size = image.shape[axis]
    taps = [math.exp(-((step - radius) ** 2) / (2 * sigma**2)) for step in range(2 * radius + 1)]
    return sum(tap * padded.narrow(axis, step, size) for step, tap in enumerate(taps))


def gate_and_residual(grown: Tensor, gate: Tensor | None, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Straight-through gate: adds an exact zero forward, and <g, grown> to the gate's gradient."""
    if gate is not None:
        grown = grown + grown.detach() * (gate - gate.detach())[..., None]
    if residual is not None:
        grown = grown + residual
    return grown.to(dtype)
