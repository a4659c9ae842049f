"""Cosine boundary probability of sequences.

    p[t] = clamp((1 - cos(q[t-1], k[t])) / 2, 0, 1),  1 at the first row of every sequence

Forward is one pass: norms, dot product and clamp from one read of q and k. Backward is one pass too. With
g = -grad_p[t] / 2, the gradient by the cosine,

    grad_q[t-1] = g (k / (|q| |k|) - cos q / |q|^2),  grad_k[t] = g (q / (|q| |k|) - cos k / |k|^2)

A row whose squares would overflow is first shrunk by a power of two, on which the cosine does not depend; its gradient
is multiplied by the same factor. Row t of every tile holds the pair q[t-1], k[t]. Both appear in p[t] alone, so no
gradient is a sum over rows.

In the comments at pointers, "float" is float32, bfloat16 or float16. Without a named stride, rows are contiguous.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcdit.kernels import launch
from dcdit.kernels.numerics import LARGE, NORM_EPS, SHRINKING_FACTOR, cdiv, next_power_of_2

_NORM_EPS = tl.constexpr(NORM_EPS)
_LARGE = tl.constexpr(LARGE)
_SHRINKING_FACTOR = tl.constexpr(SHRINKING_FACTOR)


@triton.jit
def _shrink(x):
    """Rows [ROWS, BLOCK_D] times a factor [ROWS, 1] that is 1 unless their squares may overflow; and the factor."""
    factor = tl.where(tl.max(tl.abs(x), axis=1) > _LARGE, _SHRINKING_FACTOR, 1.0)[:, None]
    return x * factor, factor


@triton.jit
def _load_pair(q_ptr, k_ptr, row, rows, q_stride, k_stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """q[row - 1] and k[row] in float32, [ROWS, BLOCK_D] each; zero where one of them is outside."""
    col = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    inside = ((row > 0) & (row < rows))[:, None] & (col < D)[None, :]  # [ROWS, BLOCK_D]
    row = row.to(tl.int64)[:, None]  # [ROWS, 1]
    q = tl.load(q_ptr + (row - 1) * q_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + row * k_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    return q, k


@triton.jit
def _starts_sequence(
    row, rows,
    cu_ptr,  # (sequences + 1,) int32; unused if not PACKED
    length, sequences, halvings, PACKED: tl.constexpr,
):  # fmt: skip
    """Whether a sequence starts at a row. The row after the last one counts as a start."""
    if PACKED:
        row = tl.minimum(row, rows)
        low = tl.zeros_like(row)
        high = low + sequences
        for _ in range(halvings):
            middle = (low + high) // 2
            before = tl.load(cu_ptr + middle) < row
            low = tl.where(before, middle + 1, low)
            high = tl.where(before, high, middle)
        # A last entry of cu_seqlens below rows is not found.
        return tl.load(cu_ptr + tl.minimum(low, sequences)) == row
    else:
        return row % length == 0


launch.set_default_configs(
    "cosine_fwd",
    D={
        64: {"ROWS": 32, "num_warps": 4},
        256: {"ROWS": 8, "num_warps": 4},
        1024: {"ROWS": 4, "num_warps": 4},
        2048: {"ROWS": 4, "num_warps": 8},
    },
)


@triton.jit(do_not_specialize=["rows", "length", "sequences", "halvings"])
def _cosine_fwd_kernel(
    q_ptr,  # (rows, D) float, row stride q_stride
    k_ptr,  # (rows, D) float, row stride k_stride
    cu_ptr,  # (sequences + 1,) int32; None if not PACKED
    p_ptr,  # (rows,) float32
    rows, length, sequences, halvings, q_stride, k_stride,
    D: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    # The loads of the tiles start first, and the search for the starts runs while they are under way.
    q, k = _load_pair(q_ptr, k_ptr, row, rows, q_stride, k_stride, D, BLOCK_D)  # [ROWS, BLOCK_D]
    is_first = _starts_sequence(row, rows, cu_ptr, length, sequences, halvings, PACKED)  # [ROWS]
    q, _ = _shrink(q)
    k, _ = _shrink(k)
    norm_q = tl.maximum(tl.sqrt(tl.sum(q * q, axis=1)), _NORM_EPS)
    norm_k = tl.maximum(tl.sqrt(tl.sum(k * k, axis=1)), _NORM_EPS)
    p = (1.0 - tl.sum(q * k, axis=1) / (norm_q * norm_k)) * 0.5
    p = tl.clamp(p, 0.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(p_ptr + row, tl.where(is_first, 1.0, p), mask=row < rows)


launch.set_default_configs(
    "cosine_bwd",
    D={
        64: {"ROWS": 16, "num_warps": 4},
        256: {"ROWS": 8, "num_warps": 4},
        1024: {"ROWS": 2, "num_warps": 4},
        2048: {"ROWS": 2, "num_warps": 8},
    },
)


@triton.jit(do_not_specialize=["rows", "length", "sequences", "halvings"])
def _cosine_bwd_kernel(
    grad_ptr,  # (rows,) float: gradient of p
    q_ptr,  # (rows, D) float, row stride q_stride
    k_ptr,  # (rows, D) float, row stride k_stride
    cu_ptr,  # (sequences + 1,) int32; None if not PACKED
    grad_q_ptr,  # (rows, D) in q's dtype; empty without NEED_Q
    grad_k_ptr,  # (rows, D) in k's dtype; empty without NEED_K
    rows, length, sequences, halvings, q_stride, k_stride,
    D: tl.constexpr, PACKED: tl.constexpr, NEED_Q: tl.constexpr, NEED_K: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    q, k = _load_pair(q_ptr, k_ptr, row, rows, q_stride, k_stride, D, BLOCK_D)  # [ROWS, BLOCK_D]
    is_first = _starts_sequence(row, rows, cu_ptr, length, sequences, halvings, PACKED)  # [ROWS]
    q, factor_q = _shrink(q)
    k, factor_k = _shrink(k)
    norm_q, norm_k = tl.sqrt(tl.sum(q * q, axis=1)), tl.sqrt(tl.sum(k * k, axis=1))
    inv_q, inv_k = 1.0 / tl.maximum(norm_q, _NORM_EPS), 1.0 / tl.maximum(norm_k, _NORM_EPS)
    cosine = tl.sum(q * k, axis=1) * inv_q * inv_k
    # Rounding alone takes the cosine beyond +-1. There p is clamped and has no derivative.
    clamped = (cosine > 1.0) | (cosine < -1.0)
    grad_p = tl.load(grad_ptr + row, mask=row < rows, other=0.0).to(tl.float32)
    grad_cosine = tl.where(clamped, 0.0, -0.5 * grad_p)  # [ROWS]
    coef_other = (grad_cosine * inv_q * inv_k)[:, None]
    col = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    row64 = row.to(tl.int64)[:, None]  # [ROWS, 1]
    # At a start, tl.where stores zeros. A product with zero would let NaN in from the sequence before it.
    # A norm below _NORM_EPS is replaced by a constant, so the second term of the gradient is zero there.
    if NEED_Q:
        coef_own = tl.where(norm_q > _NORM_EPS, grad_cosine * cosine * inv_q * inv_q, 0.0)[:, None]
        grad_q = tl.where(is_first[:, None], 0.0, factor_q * (coef_other * k - coef_own * q))  # [ROWS, BLOCK_D]
        inside = ((row > 0) & (row <= rows))[:, None] & (col < D)[None, :]
        tl.store(grad_q_ptr + (row64 - 1) * D + col[None, :], grad_q.to(grad_q_ptr.dtype.element_ty), mask=inside)
    if NEED_K:
        coef_own = tl.where(norm_k > _NORM_EPS, grad_cosine * cosine * inv_k * inv_k, 0.0)[:, None]
        grad_k = tl.where(is_first[:, None], 0.0, factor_k * (coef_other * q - coef_own * k))  # [ROWS, BLOCK_D]
        inside = (row < rows)[:, None] & (col < D)[None, :]
        tl.store(grad_k_ptr + row64 * D + col[None, :], grad_k.to(grad_k_ptr.dtype.element_ty), mask=inside)


def cosine_fwd(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, length: int) -> Tensor:
    """(S, D) rows with a unit last stride -> (S,) float32. Sequences by cu_seqlens (B+1,), else all of ``length``."""
    rows, d = q.shape
    out = launch.empty((rows,), torch.float32, q.device)
    config = launch.config_for("cosine_fwd", q.device, D=d)
    launch.launch(
        _cosine_fwd_kernel, (cdiv(rows, config["ROWS"]),), q, k, cu_seqlens, out,
        rows, length, *_search(cu_seqlens), q.stride(0), k.stride(0),
        D=d, PACKED=cu_seqlens is not None, BLOCK_D=next_power_of_2(d), **config,
    )  # fmt: skip
    return out


def cosine_bwd(
    grad: Tensor, q: Tensor, k: Tensor, cu_seqlens: Tensor | None, length: int, need_q: bool, need_k: bool
) -> tuple[Tensor, Tensor]:
    """Contiguous (S,) gradient of p -> gradients of q and k, (S, D) each; (0,) where it is not needed."""
    rows, d = q.shape
    grad_q = launch.empty((rows, d) if need_q else (0,), q.dtype, q.device)
    grad_k = launch.empty((rows, d) if need_k else (0,), k.dtype, k.device)
    config = launch.config_for("cosine_bwd", q.device, D=d)
    # One row more than there are: it writes the gradient of q's last row, which is in no pair and gets zeros.
    launch.launch(
        _cosine_bwd_kernel, (rows and cdiv(rows + 1, config["ROWS"]),), grad, q, k, cu_seqlens, grad_q, grad_k,
        rows, length, *_search(cu_seqlens), q.stride(0), k.stride(0), D=d, PACKED=cu_seqlens is not None,
        NEED_Q=need_q, NEED_K=need_k, BLOCK_D=next_power_of_2(d), **config,
    )  # fmt: skip
    return grad_q, grad_k


def _search(cu_seqlens: Tensor | None) -> tuple[int, int]:
    """Index of the last entry of cu_seqlens, and the halvings of a binary search in it."""
    last = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return last, last.bit_length()
