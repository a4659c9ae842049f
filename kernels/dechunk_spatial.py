"""Spatial de-chunking: survey and nearest map, smoothing at the kept tokens, plug-back; and the way back.

Forward reads and writes (L, D) once: only (T, D) rows lie between the steps. What is kept for the backward is one of
them, the float32 difference h - s; ``h' = q h + (1 - q) s = h - (1 - q) (h - s)`` is one multiply-add away from it.
Backward reads the output gradient once.

With K the Gaussian of the distance, Z its sum with weights q, and c_i = (1 - q_i) / (Z_i + 1e-8), the gradients are,
for g the gradient of h' and v_j = sum_i K_ij c_i g_i over the other tokens i: dh_j = q_j ((1 + c_j) g_j + v_j), and
dq_j = <(1 + c_j) g_j, h_j - s_j> + <v_j, h_j> - sum_i K_ij c_i <g_i, s_i>. K is symmetric, so v is a smoothing too.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcdit.kernels import launch
from dcdit.kernels.nearest import Survey, nearest_fwd, survey_fwd
from dcdit.kernels.numerics import PROB_EPS, cdiv
from dcdit.kernels.plug_back import plug_back_bwd, plug_back_fwd
from dcdit.kernels.smooth import smooth_bwd, smooth_fwd

launch.set_default_configs("dechunk_scalar_gradients", {"BLOCK": 256, "num_warps": 4})

_PROB_EPS = tl.constexpr(PROB_EPS)


class Saved(NamedTuple):
    """What the forward leaves for the backward."""

    detail: Tensor
    """(T, D) float32: h - s."""
    scale: Tensor
    """(T,) float32: c."""
    nearest: Tensor
    """(B * L,) int32: slot of the nearest kept token."""
    rank: Tensor
    row: Tensor
    col: Tensor
    confidence: Tensor


@triton.jit(do_not_specialize=["positions", "tokens", "p_parts", "gate_parts"])
def _scalar_gradients_kernel(
    p_ptr, slot_ptr, nearest_ptr, grad_q_ptr, gate_part_ptr, grad_p_ptr, grad_gate_ptr,
    positions, tokens, p_parts, gate_parts, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up the parts that slices of the channels left, in their order."""
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = position < positions
    if grad_p_ptr is not None:
        slot = tl.load(slot_ptr + position, mask=inside, other=-1)
        p = tl.load(p_ptr + position, mask=inside, other=0.0).to(tl.float32)
        moves = (slot >= 0) & (p >= _PROB_EPS) & (p <= 1 - _PROB_EPS)
        total = tl.zeros((BLOCK,), tl.float32)
        for _ in range(p_parts):
            total += tl.load(grad_q_ptr + slot, mask=moves, other=0.0)
            grad_q_ptr += tokens
        tl.store(grad_p_ptr + position, total, mask=inside)
    if grad_gate_ptr is not None:
        owned = tl.load(nearest_ptr + position, mask=inside, other=-1) >= 0
        total = tl.zeros((BLOCK,), tl.float32)
        for _ in range(gate_parts):
            total += tl.load(gate_part_ptr + position, mask=owned, other=0.0)
            gate_part_ptr += positions
        tl.store(grad_gate_ptr + position, total, mask=inside)


def dechunk_spatial_fwd(
    h: Tensor, p: Tensor, packed_rows: Tensor, residual: Tensor | None, grid: tuple[int, int], sigma: float, radius: int
) -> tuple[Tensor, Saved]:
    """(T, D) tokens, contiguous (B, L) p and int32 packed_rows, (B * L, D) residual -> (B * L, D) in h's dtype, Saved.

    h and residual have a unit last stride. Positions of an image that keeps no token get the residual alone.

    Raises:
        ValueError: a side of the grid is above ``nearest.MAX_SIDE``.
    """
    survey = survey_fwd(packed_rows, p, grid, h.shape[0])
    nearest = nearest_fwd(survey, grid)
    detail, scale = smooth_fwd(h, survey, p.shape[0], grid, sigma, radius)
    out = plug_back_fwd(h, detail, survey, nearest, residual)
    return out, Saved(detail, scale, nearest, *survey)


def dechunk_spatial_bwd(
    grad: Tensor, h: Tensor, p: Tensor, packed_rows: Tensor, cu_seqlens: Tensor, saved: Saved, grid: tuple[int, int],
    sigma: float, radius: int, want_h: bool, want_p: bool, gate_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of h (T, D), p (B, L) and the gate (B, L), each in its own dtype, None where not wanted.

    grad is the contiguous (B * L, D) gradient of the output.
    """
    (images, length), tokens, device = p.shape, h.shape[0], h.device
    survey = Survey(*saved[3:])
    grad_h = launch.empty(tuple(h.shape), h.dtype, device) if want_h else None
    cell, along, gate_part = plug_back_bwd(
        grad, h, saved.detail, survey, saved.nearest, cu_seqlens, grid, grad_h, want_p, gate_dtype is not None
    )
    grad_q = None
    if want_h or want_p:
        grad_q = smooth_bwd(cell, h, saved.detail, along, saved.scale, survey, grad_h, images, grid, sigma, radius)
    grad_p = launch.empty((images, length), p.dtype, device) if want_p else None
    grad_gate = None if gate_dtype is None else launch.empty((images, length), gate_dtype, device)
    if grad_p is not None or grad_gate is not None:
        config = launch.config_for("dechunk_scalar_gradients", device)
        launch.launch(
            _scalar_gradients_kernel, (cdiv(images * length, config["BLOCK"]),),
            p, packed_rows, saved.nearest, grad_q, gate_part, grad_p, grad_gate, images * length, tokens,
            0 if grad_q is None else grad_q.shape[0], 0 if gate_part is None else gate_part.shape[0], **config,
        )  # fmt: skip
    return grad_h, grad_p, grad_gate
