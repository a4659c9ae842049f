"""Spatial de-chunking: smoothing at the kept tokens, then every position takes the row of its nearest token.

``h'_i = q_i h_i + (1 - q_i) s_i`` with s the Gaussian smoothing of the kept tokens; ``out_l = h'_nearest(l) +
residual_l``. The formulas are in smooth.py and plug_back.py, each with its gradient.

Forward: index of the kept tokens (1 launch), nearest token of every position (1), smoothing (1), plug-back (1). It
reads and writes the (L, D) grid once; between the steps there are (T, D) rows only. One of them is kept for the
backward, the float32 difference h - s: ``h' = h - (1 - q) (h - s)`` is one multiply-add away from it. In inference h'
takes its place, in the dtype of the result.

Backward: g, the gradient of h', as a sum over the positions of each token (4 launches), the gradients of h and q from g
(1), and the sums that slices of the channels left in parts (1). It reads the output gradient once.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcdit.kernels import launch
from dcdit.kernels.nearest import KeptIndex, kept_index_fwd, nearest_fwd
from dcdit.kernels.numerics import PROB_EPS, cdiv, widest
from dcdit.kernels.plug_back import plug_back_bwd, plug_back_fwd
from dcdit.kernels.smooth import smooth_bwd, smooth_fwd, smoothed_fwd

launch.set_default_configs("dechunk_scalar_gradients", {"BLOCK": 256, "num_warps": 4})

_PROB_EPS = tl.constexpr(PROB_EPS)


class Geometry(NamedTuple):
    """Where the kept tokens are, and how far smoothing reaches."""

    packed_rows: Tensor
    """(B, L) int32, contiguous: packed row of each kept position, -1 elsewhere."""
    cu_seqlens: Tensor
    """(B + 1,) int32, contiguous."""
    grid: tuple[int, int]
    """(H, W) with H * W = L."""
    sigma: float
    """Standard deviation of the Gaussian, in grid cells."""
    radius: int
    """Grid cells that its window reaches in each direction."""


class Saved(NamedTuple):
    """What the forward leaves for the backward."""

    h_minus_s: Tensor
    """(T, D) float32: h - s."""
    c: Tensor
    """(T,) float32: c_i = (1 - q_i) / (Z_i + 1e-8)."""
    nearest: Tensor
    """(B * L,) int32: packed row of the nearest kept token."""
    index: KeptIndex


@triton.jit(do_not_specialize=["positions", "tokens", "p_parts", "gate_parts"])
def _scalar_gradients_kernel(
    p_ptr,  # (S,)
    packed_rows_ptr,  # (S,) int32
    nearest_ptr,  # (S,) int32
    grad_q_ptr,  # (p_parts, T) float32 or None
    gate_part_ptr,  # (gate_parts, S) float32 or None
    grad_p_ptr,  # (S,), written, or None
    grad_gate_ptr,  # (S,), written, or None
    positions, tokens, p_parts, gate_parts,  # positions: S = B * L, tokens: T
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of p and of the gate: the sums of the parts that slices of the channels left, in their order."""
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK], and so is all below
    inside = position < positions
    if grad_p_ptr is not None:
        packed_row = tl.load(packed_rows_ptr + position, mask=inside, other=-1)
        p = tl.load(p_ptr + position, mask=inside, other=0.0).to(tl.float32)
        unclamped = (packed_row >= 0) & (p >= _PROB_EPS) & (p <= 1 - _PROB_EPS)
        total = tl.zeros((BLOCK,), tl.float32)
        for _ in range(p_parts):
            total += tl.load(grad_q_ptr + packed_row, mask=unclamped, other=0.0)
            grad_q_ptr += tokens
        tl.store(grad_p_ptr + position, total, mask=inside)
    if grad_gate_ptr is not None:
        has_token = tl.load(nearest_ptr + position, mask=inside, other=-1) >= 0
        total = tl.zeros((BLOCK,), tl.float32)
        for _ in range(gate_parts):
            total += tl.load(gate_part_ptr + position, mask=has_token, other=0.0)
            gate_part_ptr += positions
        tl.store(grad_gate_ptr + position, total, mask=inside)


def dechunk_spatial_fwd(h: Tensor, p: Tensor, residual: Tensor | None, geometry: Geometry) -> tuple[Tensor, Saved]:
    """(T, D) tokens, contiguous (B, L) p, (B * L, D) residual -> (B * L, D), Saved.

    The first has the wider dtype of h and residual, which have a unit last stride. Positions of an image that keeps no
    token get the residual alone.

    Raises:
        ValueError: a side of the grid is above ``nearest.MAX_SIDE``.
    """
    packed_rows, _, grid, sigma, radius = geometry
    index = kept_index_fwd(packed_rows, p, grid, h.shape[0])
    nearest = nearest_fwd(index, grid)
    h_minus_s, c = smooth_fwd(h, index, p.shape[0], grid, sigma, radius)
    out = plug_back_fwd(h, h_minus_s, index, nearest, residual)
    return out, Saved(h_minus_s, c, nearest, index)


def dechunk_spatial_inference(h: Tensor, p: Tensor, residual: Tensor | None, geometry: Geometry) -> Tensor:
    """The same without what a backward needs.

    Between the two passes over rows there is h' in the dtype of the result, in place of the float32 ``h - s``. So h' is
    rounded before the residual is added, and once more after it.
    """
    packed_rows, _, grid, sigma, radius = geometry
    index = kept_index_fwd(packed_rows, p, grid, h.shape[0])
    nearest = nearest_fwd(index, grid)
    smoothed = smoothed_fwd(h, index, p.shape[0], grid, sigma, radius, widest(h, residual))
    return plug_back_fwd(smoothed, None, index, nearest, residual)


def dechunk_spatial_bwd(
    grad: Tensor, h: Tensor, p: Tensor, geometry: Geometry, saved: Saved,
    want_h: bool, want_p: bool, gate_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of h (T, D), p (B, L) and the gate (B, L), each in its own dtype, None where not wanted.

    grad is the contiguous (B * L, D) gradient of the output; h, p, geometry and saved are those of the forward.
    """
    packed_rows, cu_seqlens, grid, sigma, radius = geometry
    h_minus_s, c, nearest, index = saved
    (images, length), tokens, device = p.shape, h.shape[0], h.device
    grad_h = launch.empty(tuple(h.shape), h.dtype, device) if want_h else None
    g, g_dot_s, gate_part = plug_back_bwd(
        grad, h, h_minus_s, index, nearest, cu_seqlens, grid, grad_h, want_p, gate_dtype is not None
    )
    grad_q = None
    if want_h or want_p:
        grad_q = smooth_bwd(g, h, h_minus_s, g_dot_s, c, index, grad_h, images, grid, sigma, radius)
    grad_p = launch.empty((images, length), p.dtype, device) if want_p else None
    grad_gate = None if gate_dtype is None else launch.empty((images, length), gate_dtype, device)
    if grad_p is not None or grad_gate is not None:
        config = launch.config_for("dechunk_scalar_gradients", device)
        launch.launch(
            _scalar_gradients_kernel, (cdiv(images * length, config["BLOCK"]),),
            p, packed_rows, nearest, grad_q, gate_part, grad_p, grad_gate, images * length, tokens,
            0 if grad_q is None else grad_q.shape[0], 0 if gate_part is None else gate_part.shape[0], **config,
        )  # fmt: skip
    return grad_h, grad_p, grad_gate
