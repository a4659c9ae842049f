"""Gaussian smoothing of the kept tokens of a grid, as products of small dense tiles over kept tokens only.

For token i at u_i, with q its clamped probability and K_ij = exp(-|u_i - u_j|^2 / (2 sigma^2)) over the kept tokens j
of the same image within ``radius`` rows and columns:

    Z_i = sum_j K_ij q_j        s_i = sum_j K_ij q_j h_j / (Z_i + 1e-8)        h'_i = q_i h_i + (1 - q_i) s_i

Forward leaves ``h_i - s_i`` and ``c_i = (1 - q_i) / (Z_i + 1e-8)``, or h' alone where there is no backward. Backward
gets g, the gradient of h'. K is symmetric, so ``v_i = sum_j K_ij c_j g_j`` over the other tokens j is another
smoothing, and with it

    dh_i = q_i ((1 + c_i) g_i + v_i)
    dq_i = <(1 + c_i) g_i, h_i - s_i> + <v_i, h_i> - sum_j K_ij c_j <g_j, s_j>, again over the other tokens j.

A program owns one block of the grid, BAND_H x STRIP_W positions, and one slice of the channels. It takes the kept
tokens of the block BM at a time, and walks over the kept tokens of their window BJ at a time: weights from coordinates
in registers, then a product on the tensor cores. The kept tokens of a rectangle are one run of packed rows per grid row
(see ``nearest.KeptIndex``). The runs of LINES grid rows make one list, so that tiles stay full at any density.

On paper, at a kept fraction f and radius R, BM tokens meet (BM / (f STRIP_W) + 2R)(STRIP_W + 2R) f others: with
BM = 32, STRIP_W = 32, f = 0.25 and R = 6 (sigma 1) 176 on a large grid, fewer at its edges, whatever L is. So the cost
is linear in L. Three other ways cost more: runs of whole grid rows are simpler to find, but meet W instead of
STRIP_W + 2R columns; a gather for each token reads (2R + 1)^2 f rows for that token alone, here BM tokens share theirs;
a convolution over all grid positions multiplies the arithmetic by 1 / f^2.

The sums leave out a token's own part. The difference that smoothing makes comes from the other tokens alone,
``h - s = (h (Z' + 1e-8) - sum' K q h) / (Z + 1e-8)`` with the primed sums over others. Computed as a difference of two
nearly equal rows it would drown in rounding where a token has hardly any company, and so would the gradient of q.

Weights are as accurate as float32. For bfloat16 tokens a weight is cut into three bfloat16 parts, 24 bits together, so
every product is exact before its float32 sum. Other dtypes use the input precision ``bf16x6``, which cuts both sides
that way and leaves out only products below 2^-24. ("tf32" would lose half the bits, "ieee" does without tensor cores.)
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcdit.kernels import launch
from dcdit.kernels.nearest import KeptIndex
from dcdit.kernels.numerics import ROW_EPS, cdiv

_GRID_BLOCK = {"BAND_H": 8, "STRIP_W": 32, "num_stages": 1}
launch.set_default_configs(
    "smooth_bf16",
    D={
        32: {**_GRID_BLOCK, "BM": 32, "LINES": 32, "BJ": 32, "BLOCK_D": 32, "num_warps": 4},
        256: {**_GRID_BLOCK, "BM": 32, "LINES": 32, "BJ": 32, "BLOCK_D": 128, "num_warps": 8, "maxnreg": 96},
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
_INT32_MAX = tl.constexpr(2**31 - 1)
# The interpreter keeps bfloat16 as integers and would multiply those, so there the three parts are float32 numbers. It
# also has one input precision only.
_PART = tl.constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16)
_INPUT_PRECISION = tl.constexpr("ieee" if triton.knobs.runtime.interpret else "bf16x6")


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
        acc = tl.dot(weight, rows.to(tl.float32), acc, input_precision=_INPUT_PRECISION)
    return acc


@triton.jit
def _load_runs(prefix_ptr, row, exists, left, right, width):
    """Runs of kept tokens in the columns ``left <= col < right`` of each grid row [G]: the first packed row of each
    run, where the run starts in the list of all runs, and its length."""
    prefix_ptr += row.to(tl.int64) * (width + 1)
    first = tl.load(prefix_ptr + left, mask=exists, other=0)
    length = tl.load(prefix_ptr + right, mask=exists, other=0) - first
    return first, tl.cumsum(length, 0) - length, length


@triton.jit
def _packed_rows_of(index, first, start, length):
    """Packed rows at the indices [N] of a list of runs [G]; -1 past the end of the list."""
    within = index[:, None] - start[None, :]  # [N, G]
    return tl.sum(tl.where((within >= 0) & (within < length[None, :]), first[None, :] + within + 1, 0), 1) - 1


@triton.jit
def _load_block_tokens(
    prefix_ptr, begin, height, width, bands, strips, BM: tl.constexpr, BAND_H: tl.constexpr, STRIP_W: tl.constexpr
):
    """The first row of this program's image in the stacked grids, the packed rows of its block's kept tokens from the
    index ``begin`` on [BM] (-1 past the last), and the number of kept tokens in the block.

    Called anew for every tile, from the cache: held over the loops of a window, the runs would cost registers there.
    """
    block = tl.program_id(0)
    strip = block % strips
    band = block // strips % bands
    top = block // strips // bands * height
    row = band * BAND_H + tl.arange(0, BAND_H)  # [BAND_H], in the image
    right = tl.minimum((strip + 1) * STRIP_W, width)
    first, start, length = _load_runs(prefix_ptr, top + row, row < height, strip * STRIP_W, right, width)
    return top, _packed_rows_of(begin + tl.arange(0, BM), first, start, length), tl.sum(length, 0)


@triton.jit
def _window_sum(
    source_ptr,  # (T, D), row stride source_stride
    weight_ptr,  # (T,) float32
    dot_ptr,  # (parts, T) float32 or None
    prefix_ptr,  # (B * H, W + 1) int32
    row_ptr,  # (T,) int32
    col_ptr,  # (T,) int32
    packed_row, top, height, width,  # packed_row: [BM], -1 where there is no token
    source_stride, tokens, parts, radius, exponent_scale, channel,  # channel: [BLOCK_D]
    D: tl.constexpr, BM: tl.constexpr, BJ: tl.constexpr, LINES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums over the other tokens of a window: ``K (weight source)`` [BM, BLOCK_D] and ``K (weight dot)`` [BM].

    dot is the sum of its parts, or 1 where there are none; each slice of the channels sums its share of the parts.
    """
    real = packed_row >= 0
    row = tl.load(row_ptr + packed_row, mask=real, other=0)  # [BM]
    col = tl.load(col_ptr + packed_row, mask=real, other=0)  # [BM]
    # One window for all tokens of the tile.
    first_row = tl.maximum(tl.min(tl.where(real, row, _INT32_MAX), 0) - radius, top)
    end_row = tl.minimum(tl.max(tl.where(real, row, -1), 0) + radius + 1, top + height)
    left = tl.maximum(tl.min(tl.where(real, col, _INT32_MAX), 0) - radius, 0)
    right = tl.minimum(tl.max(tl.where(real, col, -1), 0) + radius + 1, width)
    acc = tl.zeros((BM, BLOCK_D), tl.float32)
    # Summed over its columns once, after the loops.
    total = tl.zeros((BM, BJ), tl.float32)
    for start_row in tl.range(first_row, end_row, LINES, disable_licm=True):
        window_row = start_row + tl.arange(0, LINES)  # [LINES]
        first, start, length = _load_runs(prefix_ptr, window_row, window_row < end_row, left, right, width)
        for begin in range(0, tl.sum(length, 0), BJ):
            other = _packed_rows_of(begin + tl.arange(0, BJ), first, start, length)  # [BJ]
            present = other >= 0
            down = tl.load(row_ptr + other, mask=present, other=0)[None, :] - row[:, None]  # [BM, BJ]
            across = tl.load(col_ptr + other, mask=present, other=0)[None, :] - col[:, None]  # [BM, BJ]
            near = (tl.abs(down) <= radius) & (tl.abs(across) <= radius) & ((down != 0) | (across != 0))
            kernel = tl.where(near, tl.exp2((down * down + across * across).to(tl.float32) * exponent_scale), 0.0)
            # The weight of a missing token is 0, so its coordinates do not matter.
            weight = tl.load(weight_ptr + other, mask=present, other=0.0)  # [BJ]
            source = tl.load(
                source_ptr + other.to(tl.int64)[:, None] * source_stride + channel[None, :],
                mask=present[:, None] & (channel < D)[None, :], other=0.0,
            )  # [BJ, BLOCK_D]  # fmt: skip
            acc = _multiply_add(kernel * weight[None, :], source, acc)
            if dot_ptr is None:
                total += kernel * weight[None, :]
            else:
                dot = tl.zeros((BJ,), tl.float32)
                part_ptr = dot_ptr + tl.program_id(1).to(tl.int64) * tokens
                for _ in tl.range(tl.program_id(1), parts, tl.num_programs(1), loop_unroll_factor=1):
                    dot += tl.load(part_ptr + other, mask=present, other=0.0)
                    part_ptr += tl.num_programs(1).to(tl.int64) * tokens
                total += kernel * (weight * dot)[None, :]
    return acc, tl.sum(total, 1)


@triton.jit(do_not_specialize=["height", "width", "bands", "strips", "tokens", "radius"])
def _smooth_fwd_kernel(
    h_ptr,  # (T, D), row stride h_stride
    prefix_ptr,  # (B * H, W + 1) int32
    row_ptr,  # (T,) int32
    col_ptr,  # (T,) int32
    q_ptr,  # (T,) float32
    out_ptr,  # (T, D), written: float32 h - s, or h' in any float dtype without c
    c_ptr,  # (T,) float32, written, or None
    height, width, bands, strips,  # H, W, and the blocks down and across a grid
    tokens, radius, h_stride, exponent_scale,  # tokens: T
    D: tl.constexpr, BAND_H: tl.constexpr, STRIP_W: tl.constexpr,
    BM: tl.constexpr, BJ: tl.constexpr, LINES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program writes ``h - s`` and c, or h', of the kept tokens of one block, for one slice of the channels."""
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    top, packed_row, kept = _load_block_tokens(prefix_ptr, 0, height, width, bands, strips, BM, BAND_H, STRIP_W)
    for begin in tl.range(0, kept, BM, disable_licm=True):
        top, packed_row, kept = _load_block_tokens(
            prefix_ptr, begin, height, width, bands, strips, BM, BAND_H, STRIP_W
        )  # fmt: skip
        acc, total = _window_sum(
            h_ptr, q_ptr, None, prefix_ptr, row_ptr, col_ptr, packed_row, top, height, width,
            h_stride, tokens, 0, radius, exponent_scale, channel, D, BM, BJ, LINES, BLOCK_D,
        )  # fmt: skip
        real = packed_row >= 0
        inside = real[:, None] & (channel < D)[None, :]  # [BM, BLOCK_D]
        buffer_row = packed_row.to(tl.int64)[:, None]
        h = tl.load(h_ptr + buffer_row * h_stride + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        q = tl.load(q_ptr + packed_row, mask=real, other=0.0)  # [BM]
        norm_of_others = total + _ROW_EPS
        norm = norm_of_others + q
        c = (1 - q) / norm
        if c_ptr is None:
            out = h * (1 - c * norm_of_others)[:, None] + acc * c[:, None]  # h', without a division of each element
        else:
            out = (h * norm_of_others[:, None] - acc) / norm[:, None]
            if tl.program_id(1) == 0:
                tl.store(c_ptr + packed_row, c, mask=real)
        tl.store(out_ptr + buffer_row * D + channel[None, :], out, mask=inside)


@triton.jit(do_not_specialize=["height", "width", "bands", "strips", "tokens", "parts", "radius"])
def _smooth_bwd_kernel(
    g_ptr,  # (T, D) float32
    h_ptr,  # (T, D), row stride h_stride
    h_minus_s_ptr,  # (T, D) float32
    g_dot_s_ptr,  # (parts, T) float32 or None
    prefix_ptr,  # (B * H, W + 1) int32
    row_ptr,  # (T,) int32
    col_ptr,  # (T,) int32
    q_ptr,  # (T,) float32
    c_ptr,  # (T,) float32
    grad_h_ptr,  # (T, D), written, or None
    grad_q_ptr,  # (slices of D, T) float32, written, or None
    height, width, bands, strips,  # H, W, and the blocks down and across a grid
    tokens, parts, radius, h_stride, exponent_scale,  # tokens: T, parts: of g_dot_s
    D: tl.constexpr, BAND_H: tl.constexpr, STRIP_W: tl.constexpr,
    BM: tl.constexpr, BJ: tl.constexpr, LINES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program writes the gradients of h and q of the kept tokens of one block, for one slice of the channels."""
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    top, packed_row, kept = _load_block_tokens(prefix_ptr, 0, height, width, bands, strips, BM, BAND_H, STRIP_W)
    for begin in tl.range(0, kept, BM, disable_licm=True):
        top, packed_row, kept = _load_block_tokens(
            prefix_ptr, begin, height, width, bands, strips, BM, BAND_H, STRIP_W
        )  # fmt: skip
        v, total = _window_sum(
            g_ptr, c_ptr, g_dot_s_ptr, prefix_ptr, row_ptr, col_ptr, packed_row, top, height, width,
            D, tokens, parts, radius, exponent_scale, channel, D, BM, BJ, LINES, BLOCK_D,
        )  # fmt: skip
        real = packed_row >= 0
        inside = real[:, None] & (channel < D)[None, :]  # [BM, BLOCK_D]
        buffer_row = packed_row.to(tl.int64)[:, None]
        own_g = tl.load(g_ptr + buffer_row * D + channel[None, :], mask=inside, other=0.0)
        own_g *= 1 + tl.load(c_ptr + packed_row, mask=real, other=0.0)[:, None]
        if grad_h_ptr is not None:
            q = tl.load(q_ptr + packed_row, mask=real, other=0.0)  # [BM]
            tl.store(grad_h_ptr + buffer_row * D + channel[None, :], q[:, None] * (own_g + v), mask=inside)
        if grad_q_ptr is not None:
            h = tl.load(h_ptr + buffer_row * h_stride + channel[None, :], mask=inside, other=0.0).to(tl.float32)
            h_minus_s = tl.load(h_minus_s_ptr + buffer_row * D + channel[None, :], mask=inside, other=0.0)
            grad_q = tl.sum(own_g * h_minus_s + v * h, 1) - total
            tl.store(grad_q_ptr + tl.program_id(1).to(tl.int64) * tokens + packed_row, grad_q, mask=real)


def _exponent_scale(sigma: float) -> float:
    """exp(-d^2 / (2 sigma^2)) = 2^(exponent_scale d^2)"""
    return -math.log2(math.e) / (2 * sigma**2)


def _blocks(grid: tuple[int, int], config: dict[str, int]) -> tuple[int, int]:
    """Bands and strips: blocks of BAND_H x STRIP_W positions down and across a grid."""
    return cdiv(grid[0], config["BAND_H"]), cdiv(grid[1], config["STRIP_W"])


def smooth_fwd(
    h: Tensor, index: KeptIndex, images: int, grid: tuple[int, int], sigma: float, radius: int
) -> tuple[Tensor, Tensor]:
    """(T, D) tokens, unit last stride -> float32 (T, D) ``h - s`` and float32 (T,) ``c``.

    Rows of padding tokens stay unwritten.
    """
    h_minus_s = launch.empty(tuple(h.shape), torch.float32, h.device)
    c = launch.empty((h.shape[0],), torch.float32, h.device)
    _launch_fwd(h, h_minus_s, c, index, images, grid, sigma, radius)
    return h_minus_s, c


def smoothed_fwd(
    h: Tensor, index: KeptIndex, images: int, grid: tuple[int, int], sigma: float, radius: int, dtype: torch.dtype
) -> Tensor:
    """h', (T, D), rounded to a dtype. Rows of padding tokens stay unwritten."""
    smoothed = launch.empty(tuple(h.shape), dtype, h.device)
    _launch_fwd(h, smoothed, None, index, images, grid, sigma, radius)
    return smoothed


def _launch_fwd(
    h: Tensor, out: Tensor, c: Tensor | None, index: KeptIndex, images: int, grid: tuple[int, int], sigma: float,
    radius: int,
) -> None:  # fmt: skip
    tokens, d = h.shape
    config = launch.config_for("smooth_bf16" if h.dtype == torch.bfloat16 else "smooth_float32", h.device, D=d)
    bands, strips = _blocks(grid, config)
    launch.launch(
        _smooth_fwd_kernel, (images * bands * strips, cdiv(d, config["BLOCK_D"])), h, *index, out, c,
        *grid, bands, strips, tokens, radius, h.stride(0), _exponent_scale(sigma), D=d, **config,
    )  # fmt: skip


def smooth_bwd(
    g: Tensor, h: Tensor, h_minus_s: Tensor, g_dot_s: Tensor | None, c: Tensor, index: KeptIndex,
    grad_h: Tensor | None, images: int, grid: tuple[int, int], sigma: float, radius: int,
) -> Tensor | None:  # fmt: skip
    """Gradients of h and q from g, the gradient of h'.

    Args:
        g: contiguous (T, D) float32.
        h: (T, D) with a unit last stride.
        h_minus_s, c: from the forward.
        g_dot_s: (parts, T) float32 whose sum over parts is ``<g_i, s_i>``; None if no gradient of q is wanted.
        grad_h: (T, D) in h's dtype; the rows of real tokens are written. None if it is not wanted.

    Returns:
        float32 (slices, T) whose sum over slices is the gradient of q, or None.
    """
    tokens, d = h.shape
    config = launch.config_for("smooth_float32", h.device, D=d)
    slices = cdiv(d, config["BLOCK_D"])
    bands, strips = _blocks(grid, config)
    parts = 0 if g_dot_s is None else g_dot_s.shape[0]
    grad_q = None if g_dot_s is None else launch.empty((slices, tokens), torch.float32, h.device)
    launch.launch(
        _smooth_bwd_kernel, (images * bands * strips, slices), g, h, h_minus_s, g_dot_s, *index, c, grad_h, grad_q,
        *grid, bands, strips, tokens, parts, radius, h.stride(0), _exponent_scale(sigma), D=d, **config,
    )  # fmt: skip
    return grad_q
