"""Cosine boundary probability on a grid: each position against its filtered 3x3 neighbourhood.

    kbar[i] = sum_n w[n] k[i+n] / |k[i+n]|  over the nine neighbours n inside the image
    p[i] = clamp((1 - q[i].kbar[i] / |q[i]|) / 2, 0, 1)

The cosine is linear in the nine products t[i, n] = sum_d q[i, d] w[n, d] k[i+n, d], so nothing normalised is written.
Forward: the first pass reads q and k once and writes the products and the inverse norms, 11 numbers per position; the
second pass works on these numbers alone and writes p. Both keep their numbers in ``stats``, (15, S) float32: planes 0
to 8 hold t, plane 9 holds 1 / |q|, plane 10 holds 1 / |k|, plane 11 holds the cosine before the clamp.

Rows of q and k whose squares overflow, or nearly, stand for themselves times a power of two, on which the cosine does
not depend. Planes 12 and 13 hold these factors of q and k, 1 for all other rows, and plane 14 holds 1 / |k| of the row
as it is. The first pass finds such rows, and the second computes what depends on them, from q and k once more.

Backward: the first pass again works on numbers per position and writes ``coefs``, (4, S) float32: s, a and b of

    grad_q[i] = s[i] kbar[i] - a[i] q[i],  grad_k[i] = sum_n s[i-n] w[n] q[i-n] / |k[i]| - b[i] k[i]
    grad_w[n] = sum_i s[i] q[i] k[i+n] / |k[i+n]|

with s the gradient by the cosine over |q|; its fourth plane holds s times the factor of q. The second pass reads q and
k once more and writes these three. grad_w comes as partial sums over splits of the positions, which the host adds up.

In the comments at pointers, "float" is float32, bfloat16 or float16. Without a named stride, rows are contiguous.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcdit.kernels import launch
from dcdit.kernels.numerics import LARGE, NORM_EPS, SHRINKING_FACTOR, cdiv, next_power_of_2

PLANES = 15
"""Planes of stats."""

SHRUNK_BLOCK_D = 32
"""Most channels in a tile of rows that have to be shrunk. Narrow rows have several tiles too: with one, the compiler
would hold those of all nine neighbours at once."""

MAX_SPLITS = 128
"""Most partial sums of the weight's gradient: enough programs to fill a GPU, and little to write beside grad_q."""

_NORM_EPS = tl.constexpr(NORM_EPS)
_LARGE = tl.constexpr(LARGE)
_SHRINKING_FACTOR = tl.constexpr(SHRINKING_FACTOR)

# Planes of stats behind the nine products, and planes of coefs.
_INV_Q = tl.constexpr(9)
_INV_K = tl.constexpr(10)
_COSINE = tl.constexpr(11)
_FACTOR_Q = tl.constexpr(12)
_FACTOR_K = tl.constexpr(13)
_INV_WHOLE_K = tl.constexpr(14)
_S = tl.constexpr(0)
_A = tl.constexpr(1)
_B = tl.constexpr(2)
_S_FACTOR = tl.constexpr(3)

launch.set_default_configs("cosine2d_scalars", {"BLOCK": 128, "num_warps": 4})


@triton.jit
def _neighbour(row, rows, height, width, DY: tl.constexpr, DX: tl.constexpr):
    """Row of the position (DY, DX) further in the same image, and whether it exists. Tap 3 (DY + 1) + DX + 1."""
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
def _store_plane(ptr, plane, row, rows, value, mask):
    tl.store(ptr + plane * rows.to(tl.int64) + row, value, mask=mask)


@triton.jit
def _inverse_norm(square):
    return 1.0 / tl.maximum(tl.sqrt(square), _NORM_EPS)


@triton.jit
def _factor(square):
    """Of a row with this sum of squares, which may be infinite."""
    return tl.where(square > _LARGE * _LARGE, _SHRINKING_FACTOR, 1.0)


@triton.jit
def _load_weight(weight_ptr, col, TAP: tl.constexpr, D: tl.constexpr):
    """The weights of one neighbour, [1, BLOCK_D] float32."""
    return tl.load(weight_ptr + TAP * D + col, mask=col < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _nine_zeros(ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    zero = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    return zero, zero, zero, zero, zero, zero, zero, zero, zero


launch.set_default_configs("cosine2d_fwd", D={1024: {"ROWS": 16, "BLOCK_D": 64, "num_warps": 4}})


@triton.jit(do_not_specialize=["rows", "height", "width"])
def _cosine2d_products_kernel(
    q_ptr,  # (rows, D) float, row stride q_stride
    k_ptr,  # (rows, D) float, row stride k_stride
    weight_ptr,  # (9, D) float
    stats_ptr,  # (15, rows) float32: writes all planes but the cosine
    rows, height, width, q_stride, k_stride,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    products = _nine_zeros(ROWS, BLOCK_D)  # 9 x [ROWS, BLOCK_D]
    square_q = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    square_k = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        col = start + tl.arange(0, BLOCK_D)  # [BLOCK_D]
        q = _load_tile(q_ptr, row, q_stride, col, row < rows, D)  # [ROWS, BLOCK_D]
        square_q += q * q
        updated = ()
        for tap in tl.static_range(9):
            neighbour, exists = _neighbour(row, rows, height, width, tap // 3 - 1, tap % 3 - 1)  # [ROWS]
            k = _load_tile(k_ptr, neighbour, k_stride, col, exists, D)  # [ROWS, BLOCK_D]
            if tap == 4:
                square_k += k * k
            updated += (products[tap] + q * _load_weight(weight_ptr, col, tap, D) * k,)
        products = updated
    inside = row < rows
    for tap in tl.static_range(9):
        _store_plane(stats_ptr, tap, row, rows, tl.sum(products[tap], axis=1), inside)
    norm_q, norm_k = tl.sum(square_q, axis=1), tl.sum(square_k, axis=1)  # squared
    _store_plane(stats_ptr, _INV_Q, row, rows, _inverse_norm(norm_q), inside)
    _store_plane(stats_ptr, _INV_K, row, rows, _inverse_norm(norm_k), inside)
    _store_plane(stats_ptr, _INV_WHOLE_K, row, rows, _inverse_norm(norm_k), inside)
    _store_plane(stats_ptr, _FACTOR_Q, row, rows, _factor(norm_q), inside)
    _store_plane(stats_ptr, _FACTOR_K, row, rows, _factor(norm_k), inside)


@triton.jit
def _shrunk_cosine(
    q_ptr, k_ptr, weight_ptr, stats_ptr, row, wanted, rows, height, width, q_stride, k_stride, D: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The cosine of the wanted rows [BLOCK] from rows times their factors; writes what stats should hold of them.

    Planes 0 to 8 of a wanted row, and the inverse norms of a shrunk one. Whoever reads these meanwhile discards it.
    """
    factor_q = _load_plane(stats_ptr, _FACTOR_Q, row, rows, wanted)  # [BLOCK], and so is all but the tiles
    cosine = tl.zeros((BLOCK,), dtype=tl.float32)
    square_q = tl.zeros((BLOCK,), dtype=tl.float32)
    for tap in tl.static_range(9):
        neighbour, exists = _neighbour(row, rows, height, width, tap // 3 - 1, tap % 3 - 1)
        factor_k = _load_plane(stats_ptr, _FACTOR_K, neighbour, rows, wanted & exists)
        product = tl.zeros((BLOCK,), dtype=tl.float32)
        square_k = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, D, BLOCK_D):
            col = start + tl.arange(0, BLOCK_D)  # [BLOCK_D]
            q = factor_q[:, None] * _load_tile(q_ptr, row, q_stride, col, wanted, D)  # [BLOCK, BLOCK_D]
            k = factor_k[:, None] * _load_tile(k_ptr, neighbour, k_stride, col, wanted & exists, D)
            product += tl.sum(q * _load_weight(weight_ptr, col, tap, D) * k, axis=1)
            square_k += tl.sum(k * k, axis=1)
            if tap == 4:
                square_q += tl.sum(q * q, axis=1)
        inv_k = _inverse_norm(square_k)
        cosine += product * inv_k
        _store_plane(stats_ptr, tap, row, rows, product, wanted)
        if tap == 4:
            is_shrunk = wanted & (factor_k < 1.0)
            _store_plane(stats_ptr, _INV_K, row, rows, inv_k, is_shrunk)
            _store_plane(stats_ptr, _INV_WHOLE_K, row, rows, inv_k * factor_k, is_shrunk)
    inv_q = _inverse_norm(square_q)
    _store_plane(stats_ptr, _INV_Q, row, rows, inv_q, wanted & (factor_q < 1.0))
    return cosine * inv_q


@triton.jit(do_not_specialize=["rows", "height", "width"])
def _cosine2d_prob_kernel(
    q_ptr,  # (rows, D) float, row stride q_stride
    k_ptr,  # (rows, D) float, row stride k_stride
    weight_ptr,  # (9, D) float
    stats_ptr,  # (15, rows) float32: writes the cosine, and all that depends on a shrunk row
    p_ptr,  # (rows,) float32
    rows, height, width, q_stride, k_stride, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK], and so is all below
    inside = row < rows
    cosine = tl.zeros((BLOCK,), dtype=tl.float32)
    is_shrunk = inside & (_load_plane(stats_ptr, _FACTOR_Q, row, rows, inside) < 1.0)
    for tap in tl.static_range(9):
        neighbour, exists = _neighbour(row, rows, height, width, tap // 3 - 1, tap % 3 - 1)
        product = _load_plane(stats_ptr, tap, row, rows, exists)
        cosine += product * _load_plane(stats_ptr, _INV_K, neighbour, rows, exists)
        is_shrunk |= exists & (_load_plane(stats_ptr, _FACTOR_K, neighbour, rows, exists) < 1.0)
    cosine *= _load_plane(stats_ptr, _INV_Q, row, rows, inside)
    if tl.max(is_shrunk.to(tl.int32), 0) > 0:
        exact = _shrunk_cosine(
            q_ptr, k_ptr, weight_ptr, stats_ptr, row, is_shrunk, rows, height, width, q_stride, k_stride, D, BLOCK,
            BLOCK_D,
        )  # fmt: skip
        cosine = tl.where(is_shrunk, exact, cosine)
    p = tl.clamp((1.0 - cosine) * 0.5, 0.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(p_ptr + row, p, mask=inside)
    _store_plane(stats_ptr, _COSINE, row, rows, cosine, inside)


@triton.jit
def _grad_cosine_over_norm(grad_ptr, stats_ptr, row, rows, mask):
    """s: the gradient by the cosine over |q|, zero where p was clamped."""
    grad = tl.load(grad_ptr + row, mask=mask, other=0.0).to(tl.float32)
    p = (1.0 - _load_plane(stats_ptr, _COSINE, row, rows, mask)) * 0.5
    return tl.where((p < 0.0) | (p > 1.0), 0.0, -0.5 * grad * _load_plane(stats_ptr, _INV_Q, row, rows, mask))


@triton.jit(do_not_specialize=["rows", "height", "width"])
def _cosine2d_coefs_kernel(
    grad_ptr,  # (rows,) float: gradient of p
    stats_ptr,  # (15, rows) float32
    coefs_ptr,  # (4, rows) float32: s, a, b, s times the factor of q
    rows, height, width, BLOCK: tl.constexpr,
):  # fmt: skip
    """a and b are what the two normalisations remove from the gradients along q and along k."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = row < rows
    s = _grad_cosine_over_norm(grad_ptr, stats_ptr, row, rows, inside)
    inv_q = _load_plane(stats_ptr, _INV_Q, row, rows, inside)
    inv_k = _load_plane(stats_ptr, _INV_K, row, rows, inside)
    b = tl.zeros((BLOCK,), dtype=tl.float32)
    for tap in tl.static_range(9):
        neighbour, exists = _neighbour(row, rows, height, width, 1 - tap // 3, 1 - tap % 3)
        product = _load_plane(stats_ptr, tap, neighbour, rows, exists)
        b += product * _grad_cosine_over_norm(grad_ptr, stats_ptr, neighbour, rows, exists)
    a = s * inv_q * _load_plane(stats_ptr, _COSINE, row, rows, inside)
    # A norm below _NORM_EPS is replaced by a constant, whose derivative is zero.
    a = tl.where(inv_q * _NORM_EPS < 1.0, a, 0.0)
    b = tl.where(inv_k * _NORM_EPS < 1.0, b * inv_k * inv_k * inv_k, 0.0)
    _store_plane(coefs_ptr, _S, row, rows, s, inside)
    _store_plane(coefs_ptr, _A, row, rows, a, inside)
    _store_plane(coefs_ptr, _B, row, rows, b, inside)
    _store_plane(coefs_ptr, _S_FACTOR, row, rows, s * _load_plane(stats_ptr, _FACTOR_Q, row, rows, inside), inside)


launch.set_default_configs("cosine2d_bwd", D={1024: {"ROWS": 16, "BLOCK_D": 64, "num_warps": 4}})


@triton.jit(do_not_specialize=["rows", "height", "width", "tiles"])
def _cosine2d_bwd_kernel(
    q_ptr,  # (rows, D) float, row stride q_stride
    k_ptr,  # (rows, D) float, row stride k_stride
    weight_ptr,  # (9, D) float
    stats_ptr,  # (15, rows) float32
    coefs_ptr,  # (4, rows) float32: s, a, b, s times the factor of q
    grad_q_ptr,  # (rows, D) in q's dtype; empty without NEED_Q
    grad_k_ptr,  # (rows, D) in k's dtype; empty without NEED_K
    partial_ptr,  # (splits, 9, D) float32: gradient of the weight over each split; empty without NEED_WEIGHT
    rows, height, width, tiles, q_stride, k_stride, D: tl.constexpr, NEED_Q: tl.constexpr, NEED_K: tl.constexpr,
    NEED_WEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    row = split * tiles * ROWS + tl.arange(0, ROWS)  # [ROWS]
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    weight_sums = _nine_zeros(ROWS, BLOCK_D)  # 9 x [ROWS, BLOCK_D]
    for _ in range(tiles):
        inside = row < rows
        target = row.to(tl.int64)[:, None] * D + col[None, :]  # [ROWS, BLOCK_D]
        target_mask = inside[:, None] & (col < D)[None, :]
        # grad_k, then grad_q: the store between them keeps the loads of both from filling the registers together.
        if NEED_K:
            total = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
            for tap in tl.static_range(9):
                neighbour, exists = _neighbour(row, rows, height, width, 1 - tap // 3, 1 - tap % 3)
                s = _load_plane(coefs_ptr, _S_FACTOR, neighbour, rows, exists)[:, None]  # [ROWS, 1]
                q = s * _load_tile(q_ptr, neighbour, q_stride, col, exists, D)  # [ROWS, BLOCK_D]
                total += q * _load_weight(weight_ptr, col, tap, D)
            total *= _load_plane(stats_ptr, _INV_K, row, rows, inside)[:, None]
            b = _load_plane(coefs_ptr, _B, row, rows, inside)[:, None]
            factor = _load_plane(stats_ptr, _FACTOR_K, row, rows, inside)[:, None]
            k = factor * _load_tile(k_ptr, row, k_stride, col, inside, D)  # [ROWS, BLOCK_D]
            grad_k = factor * (total - b * k)
            tl.store(grad_k_ptr + target, grad_k.to(grad_k_ptr.dtype.element_ty), mask=target_mask)
        if NEED_Q or NEED_WEIGHT:
            s = _load_plane(coefs_ptr, _S, row, rows, inside)[:, None]  # [ROWS, 1]
            factor = _load_plane(stats_ptr, _FACTOR_Q, row, rows, inside)[:, None]
            q = factor * _load_tile(q_ptr, row, q_stride, col, inside, D)  # [ROWS, BLOCK_D]
            kbar = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
            updated = ()
            for tap in tl.static_range(9):
                neighbour, exists = _neighbour(row, rows, height, width, tap // 3 - 1, tap % 3 - 1)
                inv_k = _load_plane(stats_ptr, _INV_WHOLE_K, neighbour, rows, exists)[:, None]
                k = inv_k * _load_tile(k_ptr, neighbour, k_stride, col, exists, D)  # [ROWS, BLOCK_D]
                kbar += k * _load_weight(weight_ptr, col, tap, D)
                updated += (weight_sums[tap] + s * q * k,)
            if NEED_WEIGHT:
                weight_sums = updated
            if NEED_Q:
                a = _load_plane(coefs_ptr, _A, row, rows, inside)[:, None]
                grad_q = factor * (s * kbar - a * q)  # [ROWS, BLOCK_D]
                tl.store(grad_q_ptr + target, grad_q.to(grad_q_ptr.dtype.element_ty), mask=target_mask)
        row += ROWS
    if NEED_WEIGHT:
        for tap in tl.static_range(9):
            grad_weight = tl.sum(weight_sums[tap], axis=0)  # [BLOCK_D]
            tl.store(partial_ptr + (split.to(tl.int64) * 9 + tap) * D + col, grad_weight, mask=col < D)


def cosine2d_fwd(q: Tensor, k: Tensor, weight: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """(S, D) rows of whole images, unit last stride; contiguous weight (9, D) -> float32 p (S,) and stats (15, S)."""
    rows, d = q.shape
    p = launch.empty((rows,), torch.float32, q.device)
    stats = launch.empty((PLANES, rows), torch.float32, q.device)
    config = launch.config_for("cosine2d_fwd", q.device, D=d)
    launch.launch(
        _cosine2d_products_kernel, (cdiv(rows, config["ROWS"]),), q, k, weight, stats, rows, height, width,
        q.stride(0), k.stride(0), D=d, **_limit_block_d(config, d),
    )  # fmt: skip
    config = launch.config_for("cosine2d_scalars", q.device)
    launch.launch(
        _cosine2d_prob_kernel, (cdiv(rows, config["BLOCK"]),), q, k, weight, stats, p, rows, height, width,
        q.stride(0), k.stride(0), D=d, BLOCK_D=min(SHRUNK_BLOCK_D, max(8, next_power_of_2(d) // 4)), **config,
    )  # fmt: skip
    return p, stats


def cosine2d_bwd(
    grad: Tensor, q: Tensor, k: Tensor, weight: Tensor, stats: Tensor, height: int, width: int,
    need_q: bool, need_k: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Contiguous (S,) gradient of p -> gradients of q and k (S, D), of weight (9, D); (0,) where it is not needed."""
    rows, d = q.shape
    config = launch.config_for("cosine2d_scalars", q.device)
    coefs = launch.empty((4, rows), torch.float32, q.device)
    launch.launch(
        _cosine2d_coefs_kernel, (cdiv(rows, config["BLOCK"]),), grad, stats, coefs, rows, height, width, **config
    )

    config = launch.config_for("cosine2d_bwd", q.device, D=d)
    tiles = max(1, cdiv(rows, config["ROWS"] * MAX_SPLITS)) if need_weight else 1
    splits = cdiv(rows, config["ROWS"] * tiles)
    grad_q = launch.empty((rows, d) if need_q else (0,), q.dtype, q.device)
    grad_k = launch.empty((rows, d) if need_k else (0,), k.dtype, k.device)
    partial = launch.empty((splits, 9, d) if need_weight else (0, 0), torch.float32, q.device)
    launch.launch(
        _cosine2d_bwd_kernel, (splits, cdiv(d, config["BLOCK_D"])), q, k, weight, stats, coefs, grad_q, grad_k, partial,
        rows, height, width, tiles, q.stride(0), k.stride(0),
        D=d, NEED_Q=need_q, NEED_K=need_k, NEED_WEIGHT=need_weight, **_limit_block_d(config, d),
    )  # fmt: skip
    return grad_q, grad_k, partial.sum(0).to(weight.dtype)


def _limit_block_d(config: launch.Config, d: int) -> launch.Config:
    """A block need not be wider than the row."""
    return {**config, "BLOCK_D": min(config["BLOCK_D"], next_power_of_2(d))}
