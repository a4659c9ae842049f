"""Gaussian smoothing of the kept tokens of a grid, as products of small dense tiles over kept tokens only.

A program owns one block of the grid (BAND_H x STRIP_W positions, whatever is kept), takes the kept tokens in it BM at
a time and walks over the kept tokens of their window, BJ at a time: weights from coordinates in registers, then a
product on the tensor cores. Packed rows follow the raster order, so the kept tokens of any rectangle are one run per
grid row (see ``nearest.Survey``); the runs are strung together so that tiles stay full at any density.

On paper, at a kept share s and radius R, BM tokens meet (BM / (s STRIP_W) + 2R)(STRIP_W + 2R) s others: with BM = 32,
STRIP_W = 32, s = 0.25 and R = 6 (sigma 1) 176 on a large grid, fewer at its edges, whatever L is. So the cost is
linear in L. Runs of whole grid rows would be simpler to find, but meet W instead of STRIP_W + 2R columns; a gather per
token reads (2R + 1)^2 s rows for each token alone, here BM tokens share theirs; and taps at every grid position would
multiply the arithmetic by 1 / s^2.

A token's own part stays out of the sums: what is kept is the difference h - s that smoothing makes, straight from the
other tokens, ``(h (Z' + 1e-8) - sum' K q h) / (Z + 1e-8)`` with the primed sums over others. Taken as a difference of
two nearly equal rows it would drown in rounding for a token that has hardly any company, and with it the gradient of
q.

Weights carry the accuracy of float32. bfloat16 tokens meet a weight cut into three bfloat16 parts, 24 bits together,
so every product is exact before its float32 sum; other dtypes go through ``bf16x6``, which cuts both sides that way
and leaves out only products below 2^-24. (Plain "tf32" would lose half the bits, and "ieee" leaves the tensor cores.)
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcdit.kernels import launch
from dcdit.kernels.nearest import Survey
from dcdit.kernels.numerics import ROW_EPS, cdiv

_GRID_BLOCK = {"BAND_H": 8, "STRIP_W": 32, "num_stages": 1}
launch.set_default_configs(
    "smooth_bf16",
    D={
        32: {**_GRID_BLOCK, "BM": 32, "LINES": 32, "BJ": 32, "BLOCK_D": 32, "num_warps": 4},
        256: {**_GRID_BLOCK, "BM": 32, "LINES": 32, "BJ": 32, "BLOCK_D": 128, "num_warps": 8},
        1024: {**_GRID_BLOCK, "BM": 32, "LINES": 32, "BJ": 32, "BLOCK_D": 256, "num_warps": 8},
    },
)
launch.set_default_configs(
    "smooth_float32",
    D={
        32: {**_GRID_BLOCK, "BM": 16, "LINES": 16, "BJ": 16, "BLOCK_D": 32, "num_warps": 4, "maxnreg": 128},
        1024: {**_GRID_BLOCK, "BM": 32, "LINES": 32, "BJ": 16, "BLOCK_D": 256, "num_warps": 8},
    },
)

_ROW_EPS = tl.constexpr(ROW_EPS)
_FAR = tl.constexpr(2**31 - 1)
# The interpreter keeps bfloat16 as integers and would multiply those: there, the same three parts are float32 numbers.
# And it knows one float32 product only.
_PART = tl.constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16)
_WIDE = tl.constexpr("ieee" if triton.knobs.runtime.interpret else "bf16x6")


@triton.jit
def _multiply_add(weight, rows, acc):
    """``acc + weight @ rows``: [M, K] float32 by [K, N] to the accuracy of float32."""
    if rows.dtype == tl.bfloat16:
        rows = rows.to(_PART)
        high = weight.to(tl.bfloat16)
        rest = weight - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(low.to(_PART), rows, acc)
        acc = tl.dot(middle.to(_PART), rows, acc)
        acc = tl.dot(high.to(_PART), rows, acc)
    else:
        acc = tl.dot(weight, rows.to(tl.float32), acc, input_precision=_WIDE)
    return acc


@triton.jit
def _runs(rank_ptr, row, exists, left, right, width):
    """Kept tokens of columns ``left`` to ``right`` of each grid row: first slot, place in the whole list, and count."""
    rank_ptr += row.to(tl.int64) * (width + 1)
    first = tl.load(rank_ptr + left, mask=exists, other=0)
    count = tl.load(rank_ptr + right, mask=exists, other=0) - first
    return first, tl.cumsum(count, 0) - count, count


@triton.jit
def _listed(place, first, begin, count):
    """Slot of each place [N] in the list of runs [G]; -1 past its end."""
    within = place[:, None] - begin[None, :]
    return tl.sum(tl.where((within >= 0) & (within < count[None, :]), first[None, :] + within + 1, 0), 1) - 1


@triton.jit
def _tile(rank_ptr, start, height, width, bands, strips, BM: tl.constexpr, BAND_H: tl.constexpr, STRIP_W: tl.constexpr):
    """First row of this program's image in the stacked grids, packed rows of its block's kept tokens from ``start``
    on [BM] (-1 past the last), and how many the block has.

    Looked up anew for every tile, from the cache: held over the loops of a window, the runs would cost registers there.
    """
    block = tl.program_id(0)
    strip = block % strips
    band = block // strips % bands
    top = block // strips // bands * height
    line = band * BAND_H + tl.arange(0, BAND_H)
    right = tl.minimum((strip + 1) * STRIP_W, width)
    first, begin, count = _runs(rank_ptr, top + line, line < height, strip * STRIP_W, right, width)
    return top, _listed(start + tl.arange(0, BM), first, begin, count), tl.sum(count, 0)


@triton.jit
def _window_sum(
    source_ptr, weight_ptr, along_ptr, rank_ptr, row_ptr, col_ptr, slot, top, height, width,
    source_stride, tokens, parts, radius, fall, channel,
    D: tl.constexpr, BM: tl.constexpr, BJ: tl.constexpr, LINES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums over a window's other tokens: ``K weight source`` [BM, BLOCK_D] and ``K weight along`` [BM] (1 if None)."""
    real = slot >= 0
    row = tl.load(row_ptr + slot, mask=real, other=0)  # [BM]
    col = tl.load(col_ptr + slot, mask=real, other=0)
    from_line = tl.maximum(tl.min(tl.where(real, row, _FAR), 0) - radius, top)
    to_line = tl.minimum(tl.max(tl.where(real, row, -1), 0) + radius + 1, top + height)
    left = tl.maximum(tl.min(tl.where(real, col, _FAR), 0) - radius, 0)
    right = tl.minimum(tl.max(tl.where(real, col, -1), 0) + radius + 1, width)
    acc = tl.zeros((BM, BLOCK_D), tl.float32)
    # Summed along its rows once, behind the loops.
    total = tl.zeros((BM, BJ), tl.float32)
    for first_line in tl.range(from_line, to_line, LINES, disable_licm=True):
        line = first_line + tl.arange(0, LINES)
        first, begin, count = _runs(rank_ptr, line, line < to_line, left, right, width)
        for start in range(0, tl.sum(count, 0), BJ):
            other = _listed(start + tl.arange(0, BJ), first, begin, count)  # [BJ]
            present = other >= 0
            down = tl.load(row_ptr + other, mask=present, other=0)[None, :] - row[:, None]  # [BM, BJ]
            across = tl.load(col_ptr + other, mask=present, other=0)[None, :] - col[:, None]
            near = (tl.abs(down) <= radius) & (tl.abs(across) <= radius) & ((down != 0) | (across != 0))
            kernel = tl.where(near, tl.exp2((down * down + across * across).to(tl.float32) * fall), 0.0)
            # A missing token weighs nothing, so what its coordinates say does not matter.
            weight = tl.load(weight_ptr + other, mask=present, other=0.0)
            source = tl.load(
                source_ptr + other.to(tl.int64)[:, None] * source_stride + channel[None, :],
                mask=present[:, None] & (channel < D)[None, :], other=0.0,
            )  # fmt: skip
            acc = _multiply_add(kernel * weight[None, :], source, acc)
            if along_ptr is None:
                total += kernel * weight[None, :]
            else:
                along = tl.zeros((BJ,), tl.float32)
                part_ptr = along_ptr + tl.program_id(1).to(tl.int64) * tokens
                # The sum over <g_i, s_i> knows no channels, so each slice takes its share of the parts.
                for _ in tl.range(tl.program_id(1), parts, tl.num_programs(1), loop_unroll_factor=1):
                    along += tl.load(part_ptr + other, mask=present, other=0.0)
                    part_ptr += tl.num_programs(1).to(tl.int64) * tokens
                total += kernel * (weight * along)[None, :]
    return acc, tl.sum(total, 1)


@triton.jit(do_not_specialize=["height", "width", "bands", "strips", "tokens", "radius"])
def _smooth_fwd_kernel(
    h_ptr, rank_ptr, row_ptr, col_ptr, q_ptr, detail_ptr, scale_ptr,
    height, width, bands, strips, tokens, radius, h_stride, fall,
    D: tl.constexpr, BAND_H: tl.constexpr, STRIP_W: tl.constexpr,
    BM: tl.constexpr, BJ: tl.constexpr, LINES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    top, slot, kept = _tile(rank_ptr, 0, height, width, bands, strips, BM, BAND_H, STRIP_W)
    for start in tl.range(0, kept, BM, disable_licm=True):
        top, slot, kept = _tile(rank_ptr, start, height, width, bands, strips, BM, BAND_H, STRIP_W)
        acc, total = _window_sum(
            h_ptr, q_ptr, None, rank_ptr, row_ptr, col_ptr, slot, top, height, width,
            h_stride, tokens, 0, radius, fall, channel, D, BM, BJ, LINES, BLOCK_D,
        )  # fmt: skip
        real = slot >= 0
        inside = real[:, None] & (channel < D)[None, :]
        own = slot.to(tl.int64)[:, None]
        h = tl.load(h_ptr + own * h_stride + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        q = tl.load(q_ptr + slot, mask=real, other=0.0)
        without_own = total + _ROW_EPS
        norm = without_own + q
        detail = (h * without_own[:, None] - acc) / norm[:, None]
        tl.store(detail_ptr + own * D + channel[None, :], detail, mask=inside)
        if tl.program_id(1) == 0:
            tl.store(scale_ptr + slot, (1 - q) / norm, mask=real)


@triton.jit(do_not_specialize=["height", "width", "bands", "strips", "tokens", "parts", "radius"])
def _smooth_bwd_kernel(
    grad_ptr, h_ptr, detail_ptr, along_ptr, rank_ptr, row_ptr, col_ptr, q_ptr, scale_ptr, grad_h_ptr, grad_q_ptr,
    height, width, bands, strips, tokens, parts, radius, h_stride, fall,
    D: tl.constexpr, BAND_H: tl.constexpr, STRIP_W: tl.constexpr,
    BM: tl.constexpr, BJ: tl.constexpr, LINES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    top, slot, kept = _tile(rank_ptr, 0, height, width, bands, strips, BM, BAND_H, STRIP_W)
    for start in tl.range(0, kept, BM, disable_licm=True):
        top, slot, kept = _tile(rank_ptr, start, height, width, bands, strips, BM, BAND_H, STRIP_W)
        spread, total = _window_sum(
            grad_ptr, scale_ptr, along_ptr, rank_ptr, row_ptr, col_ptr, slot, top, height, width,
            D, tokens, parts, radius, fall, channel, D, BM, BJ, LINES, BLOCK_D,
        )  # fmt: skip
        real = slot >= 0
        inside = real[:, None] & (channel < D)[None, :]
        own = slot.to(tl.int64)[:, None]
        grad = tl.load(grad_ptr + own * D + channel[None, :], mask=inside, other=0.0)
        grad *= 1 + tl.load(scale_ptr + slot, mask=real, other=0.0)[:, None]
        if grad_h_ptr is not None:
            q = tl.load(q_ptr + slot, mask=real, other=0.0)
            tl.store(grad_h_ptr + own * D + channel[None, :], q[:, None] * (grad + spread), mask=inside)
        if grad_q_ptr is not None:
            h = tl.load(h_ptr + own * h_stride + channel[None, :], mask=inside, other=0.0).to(tl.float32)
            detail = tl.load(detail_ptr + own * D + channel[None, :], mask=inside, other=0.0)
            grad_q = tl.sum(grad * detail + spread * h, 1) - total
            tl.store(grad_q_ptr + tl.program_id(1).to(tl.int64) * tokens + slot, grad_q, mask=real)


def _fall(sigma: float) -> float:
    """exp(-d^2 / (2 sigma^2)) = 2^(fall d^2)"""
    return -math.log2(math.e) / (2 * sigma**2)


def _cuts(grid: tuple[int, int], config: dict[str, int]) -> tuple[int, int]:
    """Bands and strips that blocks of BAND_H x STRIP_W cut a grid into."""
    return cdiv(grid[0], config["BAND_H"]), cdiv(grid[1], config["STRIP_W"])


def smooth_fwd(
    h: Tensor, survey: Survey, images: int, grid: tuple[int, int], sigma: float, radius: int
) -> tuple[Tensor, Tensor]:
    """(T, D) tokens, unit last stride -> float32 (T, D) ``h_i - s_i`` and (T,) ``c_i = (1 - q_i) / (Z_i + 1e-8)``.

    ``s_i = sum_j W_ij h_j``; Z_i is the sum of its weights before normalisation. Rows of padding tokens stay unwritten.
    """
    tokens, d = h.shape
    detail = launch.empty((tokens, d), torch.float32, h.device)
    scale = launch.empty((tokens,), torch.float32, h.device)
    config = launch.config_for("smooth_bf16" if h.dtype == torch.bfloat16 else "smooth_float32", h.device, D=d)
    bands, strips = _cuts(grid, config)
    launch.launch(
        _smooth_fwd_kernel, (images * bands * strips, cdiv(d, config["BLOCK_D"])), h, *survey, detail, scale,
        *grid, bands, strips, tokens, radius, h.stride(0), _fall(sigma), D=d, **config,
    )  # fmt: skip
    return detail, scale


def smooth_bwd(
    grad: Tensor, h: Tensor, detail: Tensor, along: Tensor | None, scale: Tensor, survey: Survey,
    grad_h: Tensor | None, images: int, grid: tuple[int, int], sigma: float, radius: int,
) -> Tensor | None:  # fmt: skip
    """Gradients of ``h'_i = q_i h_i + (1 - q_i) s_i`` from that of its rows.

    Args:
        grad: contiguous (T, D) float32.
        along: (parts, T) float32 whose sum over parts is ``<g_i, s_i>``; None if no gradient of q is wanted.
        grad_h: (T, D) in h's dtype, its rows of real tokens are written; None if it is not wanted.

    Returns:
        float32 (slices, T) whose sum over slices is the gradient of q, or None.
    """
    tokens, d = h.shape
    config = launch.config_for("smooth_float32", h.device, D=d)
    slices = cdiv(d, config["BLOCK_D"])
    bands, strips = _cuts(grid, config)
    parts = 0 if along is None else along.shape[0]
    grad_q = None if along is None else launch.empty((slices, tokens), torch.float32, h.device)
    launch.launch(
        _smooth_bwd_kernel, (images * bands * strips, slices), grad, h, detail, along, *survey, scale, grad_h, grad_q,
        *grid, bands, strips, tokens, parts, radius, h.stride(0), _fall(sigma), D=d, **config,
    )  # fmt: skip
    return grad_q
