"""Cosine boundary probability on a grid: each position against its filtered 3x3 neighbourhood.

q and k are read once in each direction and never normalised in memory. The cosine is linear in the nine products
``t[i, n] = sum_d q[i, d] w[n, d] k[i + n, d]`` of a position and its neighbours, so the first kernel writes those and
the inverse norms, 11 numbers per position; everything that mixes the norms of neighbours happens on these numbers.
``stats`` (12, S) float32 holds them: planes 0-8 are t, 9 is 1/|q|, 10 is 1/|k| and 11 the cosine before the clamp.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcdit.kernels import launch
from dcdit.kernels.numerics import NORM_EPS, cdiv

launch.set_default_configs("cosine2d_fwd", D={1024: {"ROWS": 16, "BLOCK_D": 64, "num_warps": 4}})
launch.set_default_configs("cosine2d_bwd", D={1024: {"ROWS": 16, "BLOCK_D": 64, "num_warps": 4}})
launch.set_default_configs("cosine2d_scalars", {"BLOCK": 128, "num_warps": 4})

PLANES = 12
MAX_STRIPS = 128
"""Partial sums of the weight's gradient, at most: enough programs for a GPU, little to write beside dq and dk."""

_NORM_EPS = tl.constexpr(NORM_EPS)
INV_Q = tl.constexpr(9)
INV_K = tl.constexpr(10)
COSINE = tl.constexpr(11)

SLOPE = tl.constexpr(0)
ALONG_Q = tl.constexpr(1)
ALONG_K = tl.constexpr(2)


@triton.jit
def _neighbour(row, rows, height, width, DY: tl.constexpr, DX: tl.constexpr):
    """Row index of the position (DY, DX) further in the same image, and whether there is one."""
    x = row % width + DX
    y = row // width % height + DY
    return row + DY * width + DX, (row < rows) & (x >= 0) & (x < width) & (y >= 0) & (y < height)


@triton.jit
def _load_tile(ptr, row, stride, col, row_mask, D: tl.constexpr):
    """A float32 tile [ROWS, BLOCK_D], zero outside."""
    mask = row_mask[:, None] & (col < D)[None, :]
    return tl.load(ptr + row.to(tl.int64)[:, None] * stride + col[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_plane(ptr, plane, row, rows, mask):
    return tl.load(ptr + plane * rows.to(tl.int64) + row, mask=mask, other=0.0)


@triton.jit
def _store_plane(ptr, plane, row, rows, value):
    tl.store(ptr + plane * rows.to(tl.int64) + row, value, mask=row < rows)


@triton.jit
def _load_weight(weight_ptr, col, TAP: tl.constexpr, D: tl.constexpr):
    return tl.load(weight_ptr + TAP * D + col, mask=col < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _nine_zeros(ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    zero = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    return zero, zero, zero, zero, zero, zero, zero, zero, zero


@triton.jit(do_not_specialize=["rows", "height", "width"])
def _products_kernel(
    q_ptr, k_ptr, weight_ptr, stats_ptr, rows, height, width, q_stride, k_stride,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    products = _nine_zeros(ROWS, BLOCK_D)
    square_q = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    square_k = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        col = start + tl.arange(0, BLOCK_D)
        q = _load_tile(q_ptr, row, q_stride, col, row < rows, D)
        square_q += q * q
        updated = ()
        for tap in tl.static_range(9):
            near, there = _neighbour(row, rows, height, width, tap // 3 - 1, tap % 3 - 1)
            k = _load_tile(k_ptr, near, k_stride, col, there, D)
            if tap == 4:
                square_k += k * k
            updated += (products[tap] + q * _load_weight(weight_ptr, col, tap, D) * k,)
        products = updated
    inv_q = 1.0 / tl.maximum(tl.sqrt(tl.sum(square_q, axis=1)), _NORM_EPS)
    inv_k = 1.0 / tl.maximum(tl.sqrt(tl.sum(square_k, axis=1)), _NORM_EPS)
    for tap in tl.static_range(9):
        _store_plane(stats_ptr, tap, row, rows, tl.sum(products[tap], axis=1))
    _store_plane(stats_ptr, INV_Q, row, rows, inv_q)
    _store_plane(stats_ptr, INV_K, row, rows, inv_k)


@triton.jit(do_not_specialize=["rows", "height", "width"])
def _prob_kernel(stats_ptr, p_ptr, rows, height, width, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    cosine = tl.zeros((BLOCK,), dtype=tl.float32)
    for tap in tl.static_range(9):
        near, there = _neighbour(row, rows, height, width, tap // 3 - 1, tap % 3 - 1)
        product = _load_plane(stats_ptr, tap, row, rows, there)
        cosine += product * _load_plane(stats_ptr, INV_K, near, rows, there)
    cosine *= _load_plane(stats_ptr, INV_Q, row, rows, row < rows)
    p = tl.clamp((1.0 - cosine) * 0.5, 0.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(p_ptr + row, p, mask=row < rows)
    _store_plane(stats_ptr, COSINE, row, rows, cosine)


@triton.jit
def _scaled_slope(grad_ptr, stats_ptr, row, rows, mask):
    """d loss / d cosine over |q|; nothing passes where p was clamped."""
    grad = tl.load(grad_ptr + row, mask=mask, other=0.0).to(tl.float32)
    p = (1.0 - _load_plane(stats_ptr, COSINE, row, rows, mask)) * 0.5
    return tl.where((p < 0.0) | (p > 1.0), 0.0, -0.5 * grad * _load_plane(stats_ptr, INV_Q, row, rows, mask))


@triton.jit(do_not_specialize=["rows", "height", "width"])
def _scales_kernel(grad_ptr, stats_ptr, scales_ptr, rows, height, width, BLOCK: tl.constexpr):
    """Per position: the scaled slope, and what the two normalisations take back along q and along k."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = row < rows
    slope = _scaled_slope(grad_ptr, stats_ptr, row, rows, inside)
    inv_q = _load_plane(stats_ptr, INV_Q, row, rows, inside)
    inv_k = _load_plane(stats_ptr, INV_K, row, rows, inside)
    along_k = tl.zeros((BLOCK,), dtype=tl.float32)
    for tap in tl.static_range(9):
        near, there = _neighbour(row, rows, height, width, 1 - tap // 3, 1 - tap % 3)
        product = _load_plane(stats_ptr, tap, near, rows, there)
        along_k += product * _scaled_slope(grad_ptr, stats_ptr, near, rows, there)
    # Below _NORM_EPS a vector is divided by a constant, which takes nothing back.
    along_q = slope * inv_q * _load_plane(stats_ptr, COSINE, row, rows, inside)
    along_q = tl.where(inv_q * _NORM_EPS < 1.0, along_q, 0.0)
    along_k = tl.where(inv_k * _NORM_EPS < 1.0, along_k * inv_k * inv_k * inv_k, 0.0)
    _store_plane(scales_ptr, SLOPE, row, rows, slope)
    _store_plane(scales_ptr, ALONG_Q, row, rows, along_q)
    _store_plane(scales_ptr, ALONG_K, row, rows, along_k)


@triton.jit(do_not_specialize=["rows", "height", "width", "tiles"])
def _cosine2d_bwd_kernel(
    q_ptr, k_ptr, weight_ptr, stats_ptr, scales_ptr, dq_ptr, dk_ptr, partial_ptr,
    rows, height, width, tiles, q_stride, k_stride, D: tl.constexpr, NEED_Q: tl.constexpr, NEED_K: tl.constexpr,
    NEED_WEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    strip = tl.program_id(0)
    row = strip * tiles * ROWS + tl.arange(0, ROWS)  # [ROWS]
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    weight_sums = _nine_zeros(ROWS, BLOCK_D)
    for _ in range(tiles):
        inside = row < rows
        target = row.to(tl.int64)[:, None] * D + col[None, :]
        target_mask = inside[:, None] & (col < D)[None, :]
        # One after the other: the store between them keeps the loads of both from filling the registers together.
        if NEED_K:
            pull = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
            for tap in tl.static_range(9):
                near, there = _neighbour(row, rows, height, width, 1 - tap // 3, 1 - tap % 3)
                slope = _load_plane(scales_ptr, SLOPE, near, rows, there)[:, None]
                q = slope * _load_tile(q_ptr, near, q_stride, col, there, D)
                pull += q * _load_weight(weight_ptr, col, tap, D)
            pull *= _load_plane(stats_ptr, INV_K, row, rows, inside)[:, None]
            along = _load_plane(scales_ptr, ALONG_K, row, rows, inside)[:, None]
            dk = pull - along * _load_tile(k_ptr, row, k_stride, col, inside, D)
            tl.store(dk_ptr + target, dk.to(dk_ptr.dtype.element_ty), mask=target_mask)
        if NEED_Q or NEED_WEIGHT:
            slope = _load_plane(scales_ptr, SLOPE, row, rows, inside)[:, None]
            q = _load_tile(q_ptr, row, q_stride, col, inside, D)
            pull = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
            updated = ()
            for tap in tl.static_range(9):
                near, there = _neighbour(row, rows, height, width, tap // 3 - 1, tap % 3 - 1)
                inv_k = _load_plane(stats_ptr, INV_K, near, rows, there)[:, None]
                k = inv_k * _load_tile(k_ptr, near, k_stride, col, there, D)
                pull += k * _load_weight(weight_ptr, col, tap, D)
                updated += (weight_sums[tap] + slope * q * k,)
            if NEED_WEIGHT:
                weight_sums = updated
            if NEED_Q:
                dq = slope * pull - _load_plane(scales_ptr, ALONG_Q, row, rows, inside)[:, None] * q
                tl.store(dq_ptr + target, dq.to(dq_ptr.dtype.element_ty), mask=target_mask)
        row += ROWS
    if NEED_WEIGHT:
        for tap in tl.static_range(9):
            total = tl.sum(weight_sums[tap], axis=0)
            tl.store(partial_ptr + (strip.to(tl.int64) * 9 + tap) * D + col, total, mask=col < D)


def cosine2d_fwd(q: Tensor, k: Tensor, weight: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """(S, D) rows of whole images, unit last stride; contiguous weight (9, D) -> float32 p (S,) and stats (12, S)."""
    rows, d = q.shape
    p = launch.empty((rows,), torch.float32, q.device)
    stats = launch.empty((PLANES, rows), torch.float32, q.device)
    config = launch.config_for("cosine2d_fwd", q.device, D=d)
    launch.launch(
        _products_kernel, (cdiv(rows, config["ROWS"]),), q, k, weight, stats, rows, height, width,
        q.stride(0), k.stride(0), D=d, **_fit(config, d),
    )  # fmt: skip
    config = launch.config_for("cosine2d_scalars", q.device)
    launch.launch(_prob_kernel, (cdiv(rows, config["BLOCK"]),), stats, p, rows, height, width, **config)
    return p, stats


def cosine2d_bwd(
    grad: Tensor, q: Tensor, k: Tensor, weight: Tensor, stats: Tensor, height: int, width: int,
    need_q: bool, need_k: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Contiguous (S,) gradient of p -> gradients of q and k (S, D), of weight (9, D); (0,) where it is not needed."""
    rows, d = q.shape
    config = launch.config_for("cosine2d_scalars", q.device)
    scales = launch.empty((3, rows), torch.float32, q.device)
    launch.launch(_scales_kernel, (cdiv(rows, config["BLOCK"]),), grad, stats, scales, rows, height, width, **config)

    config = launch.config_for("cosine2d_bwd", q.device, D=d)
    tiles = max(1, cdiv(rows, config["ROWS"] * MAX_STRIPS)) if need_weight else 1
    strips = cdiv(rows, config["ROWS"] * tiles)
    dq = launch.empty((rows, d) if need_q else (0,), q.dtype, q.device)
    dk = launch.empty((rows, d) if need_k else (0,), k.dtype, k.device)
    partial = launch.empty((strips, 9, d) if need_weight else (0, 0), torch.float32, q.device)
    launch.launch(
        _cosine2d_bwd_kernel, (strips, cdiv(d, config["BLOCK_D"])), q, k, weight, stats, scales, dq, dk, partial,
        rows, height, width, tiles, q.stride(0), k.stride(0),
        D=d, NEED_Q=need_q, NEED_K=need_k, NEED_WEIGHT=need_weight, **_fit(config, d),
    )  # fmt: skip
    return dq, dk, partial.sum(0).to(weight.dtype)


def _fit(config: dict[str, int], d: int) -> dict[str, int]:
    """A narrow row needs no wide block."""
    return {**config, "BLOCK_D": min(config["BLOCK_D"], triton.next_power_of_2(d))}
