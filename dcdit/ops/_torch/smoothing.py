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
from torch.autograd.function import once_differentiable

from dcdit.ops._torch._common import PROB_EPS, ROW_EPS, chunk_rows, opaque, reads_are_free


def window_radius(sigma: float, prob_floor: float, dtype: torch.dtype) -> int:
    """Grid cells beyond which the weights of a full plane of tokens, together, vanish beside a row's own weight.

    The plane outside radius r weighs less than ``2 pi sigma^2 exp(-r^2 / (2 sigma^2))``; a row's own weight is at least
    ``prob_floor``; vanish means half a unit in the last place.
    """
    own = max(prob_floor, PROB_EPS)
    plane = 2 * math.pi * sigma**2
    half_ulp = torch.finfo(dtype).eps / 2
    return max(1, math.ceil(sigma * math.sqrt(2 * math.log(max(plane / (half_ulp * own), math.e)))))


def smooth(h: Tensor, q: Tensor, slots: Tensor, indices: Tensor, radius: int, sigma: float) -> Tensor:
    """``q_i h_i + (1 - q_i) sum_j W_ij h_j`` with normalised ``W_ij = exp(-|u_i - u_j|^2 / (2 sigma^2)) q_j``.

    h (T, D), wide; q (T,), 0 in slack rows; slots (B, H, W) int32, packed row of each kept position, else -1; indices
    (T,) int64, position of each packed row.
    """
    return _Smooth.apply(h, q, slots, indices, radius, sigma)


class _Smooth(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, q: Tensor, slots: Tensor, indices: Tensor, radius: int, sigma: float) -> Tensor:
        # A column of ones turns the weighted sums into their own normaliser.
        sums = _window_sums(torch.cat([h, torch.ones_like(h[:, :1])], 1), q, slots, indices, radius, sigma)
        ctx.save_for_backward(h, q, sums, slots, indices)
        ctx.window = radius, sigma
        return torch.lerp(sums[:, :-1] / (sums[:, -1:] + ROW_EPS), h, q[:, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        """With s the smoothed rows, Z their normaliser, c = (1 - q) / Z and K the kernel, symmetric with unit diagonal:

        ``dh_j = q_j (g_j + sum_i K_ij c_i g_i)`` and ``dq_j = <g_j, h_j - s_j> + sum_i K_ij c_i <g_i, h_j - s_i>``.

        A token without company has s = h, and dq = 0 up to the 1e-8 in Z: the differences are formed without the row's
        own term, which would cancel only up to rounding.
        """
        h, q, sums, slots, indices = ctx.saved_tensors
        q = q[:, None]
        z = sums[:, -1:] + ROW_EPS
        apart = (h * (sums[:, -1:] - q + ROW_EPS)).sub_(sums[:, :-1] - q * h).div_(z)  # h - s
        g_apart = _dot(grad, apart)
        g_smoothed = _dot(grad, h) - g_apart
        c = (1 - q) / z
        rows = torch.cat([grad, g_smoothed], 1)
        others = _window_sums(rows, c.squeeze(1), slots, indices, *ctx.window).sub_(rows.mul_(c))
        grad_q = (1 + c) * g_apart + _dot(others[:, :-1], h) - others[:, -1:]
        grad_h = torch.addcmul(others[:, :-1], 1 + c, grad).mul_(q)
        return grad_h, grad_q.squeeze(1), None, None, None, None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _window_sums_fake(rows: Tensor, scale: Tensor, slots: Tensor, indices: Tensor, radius: int, sigma: float) -> Tensor:
    return torch.empty_like(rows)


@opaque(_window_sums_fake)
def _window_sums(rows: Tensor, scale: Tensor, slots: Tensor, indices: Tensor, radius: int, sigma: float) -> Tensor:
    """``sum_j exp(-|u_i - u_j|^2 / (2 sigma^2)) scale_j rows_j`` over the square window around each kept token i."""
    _, height, width = slots.shape
    out = torch.zeros_like(rows)
    down, across = min(radius, height - 1), min(radius, width - 1)
    windows = F.pad(slots, (0, 0, down, down), value=-1).unfold(1, 2 * down + 1, 1)
    for image, line, tokens in _slabs(slots, rows):
        window = windows[image, line].flatten(0, 2)
        column_sums = _column_sums(rows, scale, window, _taps(down, sigma, rows))
        first = (image.start * height + line.start) * width
        taps = _taps(across, sigma, rows)
        out[tokens] = _row_sums(column_sums, indices[tokens] - first, width, taps)
    return out


def _slabs(slots: Tensor, rows: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Images, grid rows and packed rows of the pieces that keep the intermediate small: all at once on a GPU."""
    images, height, width = slots.shape
    if rows.shape[0] == 0:
        return
    if not reads_are_free(rows):
        yield slice(0, images), slice(0, height), slice(0, rows.shape[0])
        return
    positions = chunk_rows(rows.shape[1])
    group, lines = max(1, positions // (height * width)), min(height, max(1, positions // width))
    starts = F.pad((slots >= 0).sum(-1).flatten().cumsum(0), (1, 0)).tolist()
    for b in range(0, images, group):
        for y in range(0, height, lines):
            b_end, y_end = min(b + group, images), min(y + lines, height)
            yield slice(b, b_end), slice(y, y_end), slice(starts[b * height + y], starts[(b_end - 1) * height + y_end])


def _taps(radius: int, sigma: float, like: Tensor) -> Tensor:
    offset = torch.arange(-radius, radius + 1, device=like.device, dtype=like.dtype)
    return torch.exp(-(offset**2) / (2 * sigma**2))


def _column_sums(rows: Tensor, scale: Tensor, window: Tensor, taps: Tensor) -> Tensor:
    """(n, D): weighted sum of the kept tokens among the (n, K) slots of each position's window."""
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
    """(m, D): weighted sum of the columns around each kept position; zeros for a negative position (slack)."""
    step = torch.arange(taps.shape[0], device=position.device) - taps.shape[0] // 2
    column = position[:, None] % width + step
    inside = (column >= 0) & (column < width) & (position >= 0)[:, None]
    neighbour = (position[:, None] + step).clamp(0, column_sums.shape[0] - 1)
    weight = torch.where(inside, taps, 0)
    return F.embedding_bag(neighbour, column_sums, mode="sum", per_sample_weights=weight)
