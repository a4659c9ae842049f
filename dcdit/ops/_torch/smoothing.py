"""Gaussian smoothing of the kept tokens over a window of the grid.

The window is separable. First each position sums the kept tokens of its column, then each kept position sums these
column sums along its row. Both sums are weighted ``embedding_bag`` calls. The cost of a position depends on the window,
not on the grid.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dcdit.ops._torch import host_reads
from dcdit.ops._torch.custom_op import as_custom_op
from dcdit.ops._torch.packing import take_rows
from dcdit.ops._torch.row_slices import row_slices, rows_per_slice
from dcdit.ops.autograd import apply, first_derivative_only
from dcdit.ops.numerics import ROW_EPS


def smooth(h: Tensor, q: Tensor, packed_rows: Tensor, indices: Tensor, radius: int, sigma: float) -> Tensor:
    """``q_i h_i + (1 - q_i) s_i``, (T, D), where s is the smoothed h.

    ``s_i = sum_j K_ij q_j h_j / (sum_j K_ij q_j + 1e-8)`` and ``K_ij = exp(-|u_i - u_j|^2 / (2 sigma^2))``; u is the
    grid coordinate of a kept token.

    Args:
        h: (T, D) packed tokens, upcast.
        q: (T,) clamped_prob, 0 in padding rows.
        packed_rows: (B, H, W) int32, packed row of each kept position, -1 elsewhere.
        indices: (T,) int64, position of each packed row, negative in padding rows.
        radius: reach of the window in grid cells.
        sigma: standard deviation in grid cells.
    """
    smoothed, *_ = apply(_Smooth, h.contiguous(), q, packed_rows, indices, radius, sigma)
    return smoothed


class _Smooth(torch.autograd.Function):
    @staticmethod
    def forward(
        h: Tensor, q: Tensor, packed_rows: Tensor, indices: Tensor, radius: int, sigma: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _smooth_forward(h, q, packed_rows, indices, radius, sigma)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        h, q, packed_rows, indices, *ctx.window = inputs
        _, sums, z = output
        ctx.mark_non_differentiable(sums, z)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, q, sums, z, packed_rows, indices)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor, Tensor, None, None, None, None]:
        grad_h, grad_q = _smooth_backward(grad, *ctx.saved_tensors, *ctx.window)
        return grad_h, grad_q, None, None, None, None


def _forward_fake(
    h: Tensor, q: Tensor, packed_rows: Tensor, indices: Tensor, radius: int, sigma: float
) -> tuple[Tensor, Tensor, Tensor]:
    return h.new_empty(h.shape), h.new_empty(h.shape), q.new_empty(q.shape[0], 1)


@as_custom_op(_forward_fake)
def _smooth_forward(
    h: Tensor, q: Tensor, packed_rows: Tensor, indices: Tensor, radius: int, sigma: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The smoothed rows (T, D); ``sum_j K_ij q_j h_j`` (T, D); the normaliser ``z_i = sum_j K_ij q_j`` (T, 1)."""
    sums = _window_sums(h, q, packed_rows, indices, radius, sigma)
    z = _window_totals(q, packed_rows, indices, radius, sigma)[:, None]
    rows = sums / (z + ROW_EPS)
    return torch.lerp(rows, h, q[:, None], out=rows), sums, z


def _backward_fake(
    grad: Tensor,
    h: Tensor,
    q: Tensor,
    sums: Tensor,
    z: Tensor,
    packed_rows: Tensor,
    indices: Tensor,
    radius: int,
    sigma: float,
) -> tuple[Tensor, Tensor]:
    return sums.new_empty(sums.shape), q.new_empty(q.shape)


@as_custom_op(_backward_fake)
def _smooth_backward(
    grad: Tensor,
    h: Tensor,
    q: Tensor,
    sums: Tensor,
    z: Tensor,
    packed_rows: Tensor,
    indices: Tensor,
    radius: int,
    sigma: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of h (T, D) and q (T,).

    With Z = z + 1e-8, s = sums / Z and c = (1 - q) / Z, and because K is symmetric with unit diagonal:

    ``dh_j = q_j (g_j + sum_i K_ij c_i g_i)`` and ``dq_j = <g_j, h_j - s_j> + sum_i K_ij c_i <g_i, h_j - s_i>``.

    A token that is alone in its window has s = h, so its dq must be 0 up to the 1e-8 in Z. Its own term would cancel
    only up to rounding. Therefore the term i = j is left out of each sum and added in closed form.
    """
    own = q[:, None]
    norm = z + ROW_EPS
    c = (1 - own) / norm
    g_dot_h_minus_s, g_dot_s, others_dot_h = (torch.empty_like(q) for _ in range(3))
    for part in row_slices(h):
        others = sums[part] - own[part] * h[part]
        h_minus_s = (h[part] * (z[part] - own[part] + ROW_EPS)).sub_(others).div_(norm[part])
        torch.sum(h_minus_s.mul_(grad[part]), -1, out=g_dot_h_minus_s[part])
        torch.sum(h[part] * grad[part], -1, out=g_dot_s[part])
    g_dot_s -= g_dot_h_minus_s
    c_flat = c.squeeze(1)
    weighted_grad = _window_sums(grad, c_flat, packed_rows, indices, radius, sigma)
    others_dot_s = _window_totals(c_flat * g_dot_s, packed_rows, indices, radius, sigma) - c_flat * g_dot_s
    for part in row_slices(h):
        others = weighted_grad[part] - c[part] * grad[part]
        torch.sum(others.mul_(h[part]), -1, out=others_dot_h[part])
        weighted_grad[part].add_(grad[part]).mul_(own[part])
    return weighted_grad, (1 + c_flat) * g_dot_h_minus_s + others_dot_h - others_dot_s


def _window_totals(scale: Tensor, packed_rows: Tensor, indices: Tensor, radius: int, sigma: float) -> Tensor:
    """(T,): ``sum_j K_ij scale_j`` over the window; 0 in padding rows."""
    image = take_rows(scale[:, None], packed_rows.flatten()).view(packed_rows.shape)
    for axis in (1, 2):
        size = packed_rows.shape[axis]
        reach = min(radius, max(size - 1, 0))
        padded = F.pad(image, (0, 0, reach, reach) if axis == 1 else (reach, reach))
        image = torch.zeros_like(image)
        for step in range(2 * reach + 1):
            image.add_(padded.narrow(axis, step, size), alpha=math.exp(-((step - reach) ** 2) / (2 * sigma**2)))
    return take_rows(image.view(-1, 1), indices).squeeze(1)


def _window_sums(
    rows: Tensor, scale: Tensor, packed_rows: Tensor, indices: Tensor, radius: int, sigma: float
) -> Tensor:
    """(T, D): ``sum_j K_ij scale_j rows_j`` over the window; 0 in padding rows."""
    _, height, width = packed_rows.shape
    out = rows.new_zeros(rows.shape)
    if packed_rows.numel() == 0:
        return out
    down, across = min(radius, height - 1), min(radius, width - 1)
    windows = F.pad(packed_rows, (0, 0, down, down), value=-1).unfold(1, 2 * down + 1, 1)
    for images, grid_rows, tokens in _pieces(packed_rows, rows):
        window = windows[images, grid_rows].flatten(0, 2)
        column_sums = _column_sums(rows, scale, window, _gaussian(down, sigma, rows))
        first_position = (images.start * height + grid_rows.start) * width
        weights = _gaussian(across, sigma, rows)
        out[tokens] = _row_sums(column_sums, indices[tokens] - first_position, width, weights)
    return out


def _pieces(packed_rows: Tensor, rows: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Images, grid rows and packed rows of each piece of the work. Pieces keep the column sums small.

    Where host reads cost something (on a GPU), everything is one piece.
    """
    images, height, width = packed_rows.shape
    if rows.shape[0] == 0:
        return
    if not host_reads.reads_are_free(rows):
        yield slice(0, images), slice(0, height), slice(0, rows.shape[0])
        return
    positions = rows_per_slice(rows.shape[1])
    images_per_piece = max(1, positions // (height * width))
    grid_rows_per_piece = min(height, max(1, positions // width))
    # Packed row at which each grid row starts.
    starts = F.pad((packed_rows >= 0).sum(-1).flatten().cumsum(0), (1, 0)).tolist()
    for b in range(0, images, images_per_piece):
        for y in range(0, height, grid_rows_per_piece):
            b_end, y_end = min(b + images_per_piece, images), min(y + grid_rows_per_piece, height)
            yield slice(b, b_end), slice(y, y_end), slice(starts[b * height + y], starts[(b_end - 1) * height + y_end])


def _gaussian(radius: int, sigma: float, like: Tensor) -> Tensor:
    """(2 radius + 1,): ``exp(-offset^2 / (2 sigma^2))`` for the offsets -radius to radius."""
    offset = torch.arange(-radius, radius + 1, device=like.device, dtype=like.dtype)
    return torch.exp(-(offset**2) / (2 * sigma**2))


def _column_sums(rows: Tensor, scale: Tensor, window: Tensor, weights: Tensor) -> Tensor:
    """(n, D): for n positions, the weighted sum of the kept tokens in the window of their column.

    window (n, K): packed rows of the K positions of the window, -1 where not kept; weights (K,).
    """
    kept = window >= 0
    if not host_reads.reads_are_free(rows):
        token = window.clamp(min=0)
        weight = torch.where(kept, weights * scale[token], 0)
        return F.embedding_bag(token, rows, mode="sum", per_sample_weights=weight)
    entry = kept.flatten().nonzero().squeeze(1)
    token = window.flatten().index_select(0, entry)
    weight = weights.index_select(0, entry % weights.shape[0]) * scale.index_select(0, token)
    count = kept.sum(1)
    offsets = (count.cumsum(0) - count).to(token.dtype)
    return F.embedding_bag(token, rows, offsets, mode="sum", per_sample_weights=weight)


def _row_sums(column_sums: Tensor, position: Tensor, width: int, weights: Tensor) -> Tensor:
    """(m, D): weighted sum of the column sums along the row around each of m positions.

    A negative position belongs to a padding row and gives zeros. weights (K,).
    """
    offset = torch.arange(weights.shape[0], device=position.device) - weights.shape[0] // 2
    column = position[:, None] % width + offset
    inside = (column >= 0) & (column < width) & (position >= 0)[:, None]
    neighbour = (position[:, None] + offset).clamp(0, column_sums.shape[0] - 1)
    weight = torch.where(inside, weights, 0)
    return F.embedding_bag(neighbour, column_sums, mode="sum", per_sample_weights=weight)
