"""Gaussian smoothing of kept tokens: a separable window over the grid, evaluated on kept tokens only.

Both axes are weighted sums over rows ("bags"): first down the columns, where the bag of a position lists the kept
tokens of its window, then along the rows, for kept positions only. The cost of a position depends on the window, not
on the grid.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dcdit.ops._torch.packing import take_rows
from dcdit.ops._torch.rows import as_custom_op, chunk_rows, chunks, reads_are_free
from dcdit.ops.autograd import first_derivative_only
from dcdit.ops.numerics import ROW_EPS


def smooth(h: Tensor, q: Tensor, packed_rows: Tensor, indices: Tensor, radius: int, sigma: float) -> Tensor:
    """``q_i h_i + (1 - q_i) sum_j W_ij h_j`` with normalised ``W_ij = exp(-|u_i - u_j|^2 / (2 sigma^2)) q_j``.

    h (T, D), upcast; q (T,), 0 in padding rows; packed_rows (B, H, W) int32, packed row of each kept position, else -1;
    indices (T,) int64, position of each packed row.
    """
    return _Smooth.apply(h, q, packed_rows, indices, radius, sigma)


class _Smooth(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, q: Tensor, packed_rows: Tensor, indices: Tensor, radius: int, sigma: float
    ) -> Tensor:
        rows, sums, z = _smooth_forward(h, q, packed_rows, indices, radius, sigma)
        ctx.save_for_backward(h, q, sums, z, packed_rows, indices)
        ctx.window = radius, sigma
        return rows

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        grad_h, grad_q = _smooth_backward(grad, *ctx.saved_tensors, *ctx.window)
        return grad_h, grad_q, None, None, None, None


def _forward_fake(
    h: Tensor, q: Tensor, packed_rows: Tensor, indices: Tensor, radius: int, sigma: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(h), torch.empty_like(h), q.new_empty(q.shape[0], 1)


@as_custom_op(_forward_fake)
def _smooth_forward(
    h: Tensor, q: Tensor, packed_rows: Tensor, indices: Tensor, radius: int, sigma: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The smoothed rows; ``sum_j K_ij q_j h_j``, (T, D); ``sum_j K_ij q_j``, (T, 1)."""
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
    return torch.empty_like(sums), torch.empty_like(q)


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
    """With s the smoothed rows, Z their normaliser, c = (1 - q) / Z and K the kernel, symmetric with unit diagonal:

    ``dh_j = q_j (g_j + sum_i K_ij c_i g_i)`` and ``dq_j = <g_j, h_j - s_j> + sum_i K_ij c_i <g_i, h_j - s_i>``.

    A token without company has s = h, and dq = 0 up to the 1e-8 in Z: the row's own term is taken out of each sum and
    added in closed form, because it would cancel only up to rounding.
    """
    own = q[:, None]
    norm = z + ROW_EPS
    c = (1 - own) / norm
    g_apart, g_smoothed, others_h = (torch.empty_like(q) for _ in range(3))
    for part in chunks(h):
        others = sums[part] - own[part] * h[part]
        apart = (h[part] * (z[part] - own[part] + ROW_EPS)).sub_(others).div_(norm[part])  # h - s
        torch.sum(apart.mul_(grad[part]), -1, out=g_apart[part])
        torch.sum(h[part] * grad[part], -1, out=g_smoothed[part])
    g_smoothed -= g_apart
    c_flat = c.squeeze(1)
    pulled = _window_sums(grad, c_flat, packed_rows, indices, radius, sigma)
    others_smoothed = _window_totals(c_flat * g_smoothed, packed_rows, indices, radius, sigma) - c_flat * g_smoothed
    for part in chunks(h):
        others = pulled[part] - c[part] * grad[part]
        torch.sum(others.mul_(h[part]), -1, out=others_h[part])
        pulled[part].add_(grad[part]).mul_(own[part])
    return pulled, (1 + c_flat) * g_apart + others_h - others_smoothed


def _window_totals(scale: Tensor, packed_rows: Tensor, indices: Tensor, radius: int, sigma: float) -> Tensor:
    """(T,): ``sum_j K_ij scale_j``; 0 in padding rows."""
    image = take_rows(scale[:, None], packed_rows.flatten()).view(packed_rows.shape)
    for axis in (1, 2):
        size = packed_rows.shape[axis]
        reach = min(radius, size - 1)
        padded = F.pad(image, (0, 0, reach, reach) if axis == 1 else (reach, reach))
        image = torch.zeros_like(image)
        for step in range(2 * reach + 1):
            image.add_(padded.narrow(axis, step, size), alpha=math.exp(-((step - reach) ** 2) / (2 * sigma**2)))
    return take_rows(image.view(-1, 1), indices).squeeze(1)


def _window_sums(
    rows: Tensor, scale: Tensor, packed_rows: Tensor, indices: Tensor, radius: int, sigma: float
) -> Tensor:
    """(T, D): ``sum_j K_ij scale_j rows_j``, ``K_ij = exp(-|u_i - u_j|^2 / (2 sigma^2))`` in a square window."""
    _, height, width = packed_rows.shape
    out = torch.zeros_like(rows)
    down, across = min(radius, height - 1), min(radius, width - 1)
    windows = F.pad(packed_rows, (0, 0, down, down), value=-1).unfold(1, 2 * down + 1, 1)
    for image, line, tokens in _slabs(packed_rows, rows):
        window = windows[image, line].flatten(0, 2)
        column_sums = _column_sums(rows, scale, window, _taps(down, sigma, rows))
        first = (image.start * height + line.start) * width
        taps = _taps(across, sigma, rows)
        out[tokens] = _row_sums(column_sums, indices[tokens] - first, width, taps)
    return out


def _slabs(packed_rows: Tensor, rows: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Images, grid rows and packed rows of the pieces that keep the intermediate small: all at once on a GPU."""
    images, height, width = packed_rows.shape
    if rows.shape[0] == 0:
        return
    if not reads_are_free(rows):
        yield slice(0, images), slice(0, height), slice(0, rows.shape[0])
        return
    positions = chunk_rows(rows.shape[1])
    group, lines = max(1, positions // (height * width)), min(height, max(1, positions // width))
    starts = F.pad((packed_rows >= 0).sum(-1).flatten().cumsum(0), (1, 0)).tolist()
    for b in range(0, images, group):
        for y in range(0, height, lines):
            b_end, y_end = min(b + group, images), min(y + lines, height)
            yield slice(b, b_end), slice(y, y_end), slice(starts[b * height + y], starts[(b_end - 1) * height + y_end])


def _taps(radius: int, sigma: float, like: Tensor) -> Tensor:
    offset = torch.arange(-radius, radius + 1, device=like.device, dtype=like.dtype)
    return torch.exp(-(offset**2) / (2 * sigma**2))


def _column_sums(rows: Tensor, scale: Tensor, window: Tensor, taps: Tensor) -> Tensor:
    """(n, D): weighted sum of the kept tokens among the (n, K) packed_rows of each position's window."""
    kept = window >= 0
    if not reads_are_free(rows):
        token = window.clamp(min=0)
        return F.embedding_bag(token, rows, mode="sum", per_sample_weights=torch.where(kept, taps * scale[token], 0))
    entry = kept.flatten().nonzero().squeeze(1)
    token = window.flatten().index_select(0, entry)
    weight = taps.index_select(0, entry % taps.shape[0]) * scale.index_select(0, token)
    count = kept.sum(1)
    offsets = (count.cumsum(0) - count).to(token.dtype)
    return F.embedding_bag(token, rows, offsets, mode="sum", per_sample_weights=weight)


def _row_sums(column_sums: Tensor, position: Tensor, width: int, taps: Tensor) -> Tensor:
    """(m, D): weighted sum of the columns around each kept position; zeros for a negative position (padding)."""
    step = torch.arange(taps.shape[0], device=position.device) - taps.shape[0] // 2
    column = position[:, None] % width + step
    inside = (column >= 0) & (column < width) & (position >= 0)[:, None]
    neighbour = (position[:, None] + step).clamp(0, column_sums.shape[0] - 1)
    weight = torch.where(inside, taps, 0)
    return F.embedding_bag(neighbour, column_sums, mode="sum", per_sample_weights=weight)
