"""Cosine boundary probability of a sequence: norms, dot product and clamp from one read of q and k, and one pass back.

Row t of every kernel pairs q[t - 1] with k[t]. No gradient is summed: q[t - 1] and k[t] appear in p[t] alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcdit.kernels import launch
from dcdit.kernels.numerics import NORM_EPS, cdiv

launch.set_default_configs(
    "cosine_fwd",
    D={
        64: {"ROWS": 32, "num_warps": 4},
        256: {"ROWS": 8, "num_warps": 4},
        1024: {"ROWS": 4, "num_warps": 4},
        2048: {"ROWS": 4, "num_warps": 8},
    },
)
launch.set_default_configs(
    "cosine_bwd",
    D={
        64: {"ROWS": 16, "num_warps": 4},
        256: {"ROWS": 8, "num_warps": 4},
        1024: {"ROWS": 2, "num_warps": 4},
        2048: {"ROWS": 2, "num_warps": 8},
    },
)

_NORM_EPS = tl.constexpr(NORM_EPS)


@triton.jit
def _load_pair(q_ptr, k_ptr, row, rows, q_stride, k_stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    col = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    inside = ((row > 0) & (row < rows))[:, None] & (col < D)[None, :]
    at = row.to(tl.int64)[:, None]
    q = tl.load(q_ptr + (at - 1) * q_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + at * k_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    return q, k  # [ROWS, BLOCK_D]


@triton.jit
def _starts_sequence(row, rows, cu_ptr, length, sequences, steps, PACKED: tl.constexpr):
    """Whether a sequence starts at a row; the row after the last one counts as a start."""
    if PACKED:
        row = tl.minimum(row, rows)
        low = tl.zeros_like(row)
        high = low + sequences
        for _ in range(steps):
            middle = (low + high) // 2
            before = tl.load(cu_ptr + middle) < row
            low = tl.where(before, middle + 1, low)
            high = tl.where(before, high, middle)
        return tl.load(cu_ptr + tl.minimum(low, sequences)) == row  # a last entry below rows is not found
    else:
        return row % length == 0


@triton.jit(do_not_specialize=["rows", "length", "sequences", "steps"])
def _cosine_fwd_kernel(
    q_ptr, k_ptr, cu_ptr, p_ptr, rows, length, sequences, steps, q_stride, k_stride,
    D: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    # The tiles are on their way while the starts are looked up.
    q, k = _load_pair(q_ptr, k_ptr, row, rows, q_stride, k_stride, D, BLOCK_D)
    first = _starts_sequence(row, rows, cu_ptr, length, sequences, steps, PACKED)
    norm_q = tl.maximum(tl.sqrt(tl.sum(q * q, axis=1)), _NORM_EPS)
    norm_k = tl.maximum(tl.sqrt(tl.sum(k * k, axis=1)), _NORM_EPS)
    p = (1.0 - tl.sum(q * k, axis=1) / (norm_q * norm_k)) * 0.5
    p = tl.clamp(p, 0.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(p_ptr + row, tl.where(first, 1.0, p), mask=row < rows)


@triton.jit(do_not_specialize=["rows", "length", "sequences", "steps"])
def _cosine_bwd_kernel(
    grad_ptr, q_ptr, k_ptr, cu_ptr, dq_ptr, dk_ptr, rows, length, sequences, steps, q_stride, k_stride,
    D: tl.constexpr, PACKED: tl.constexpr, NEED_Q: tl.constexpr, NEED_K: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    q, k = _load_pair(q_ptr, k_ptr, row, rows, q_stride, k_stride, D, BLOCK_D)
    first = _starts_sequence(row, rows, cu_ptr, length, sequences, steps, PACKED)
    norm_q, norm_k = tl.sqrt(tl.sum(q * q, axis=1)), tl.sqrt(tl.sum(k * k, axis=1))
    inv_q, inv_k = 1.0 / tl.maximum(norm_q, _NORM_EPS), 1.0 / tl.maximum(norm_k, _NORM_EPS)
    cosine = tl.sum(q * k, axis=1) * inv_q * inv_k
    # d p / d cosine is -1/2 inside the clamp; cosine beyond +-1 is only rounding, and there p is clamped.
    clamped = (cosine > 1.0) | (cosine < -1.0)
    slope = tl.where(clamped, 0.0, -0.5 * tl.load(grad_ptr + row, mask=row < rows, other=0.0).to(tl.float32))
    cross = (slope * inv_q * inv_k)[:, None]
    col = tl.arange(0, BLOCK_D)
    at = row.to(tl.int64)[:, None]
    # A row of zeros, not a product with zero: a start must not see NaN of the sequence before it.
    if NEED_Q:
        pull = tl.where(norm_q > _NORM_EPS, slope * cosine * inv_q * inv_q, 0.0)[:, None]
        dq = tl.where(first[:, None], 0.0, cross * k - pull * q)
        inside = ((row > 0) & (row <= rows))[:, None] & (col < D)[None, :]
        tl.store(dq_ptr + (at - 1) * D + col[None, :], dq.to(dq_ptr.dtype.element_ty), mask=inside)
    if NEED_K:
        pull = tl.where(norm_k > _NORM_EPS, slope * cosine * inv_k * inv_k, 0.0)[:, None]
        dk = tl.where(first[:, None], 0.0, cross * q - pull * k)
        inside = (row < rows)[:, None] & (col < D)[None, :]
        tl.store(dk_ptr + at * D + col[None, :], dk.to(dk_ptr.dtype.element_ty), mask=inside)


def cosine_fwd(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, length: int) -> Tensor:
    """(S, D) rows with a unit last stride, sequences by cu_seqlens (B+1,) or else of one length -> (S,) float32."""
    rows, d = q.shape
    out = launch.empty((rows,), torch.float32, q.device)
    config = launch.config_for("cosine_fwd", q.device, D=d)
    launch.launch(
        _cosine_fwd_kernel, (cdiv(rows, config["ROWS"]),), q, k, cu_seqlens, out,
        rows, length, *_search(cu_seqlens), q.stride(0), k.stride(0),
        D=d, PACKED=cu_seqlens is not None, BLOCK_D=triton.next_power_of_2(d), **config,
    )  # fmt: skip
    return out


def cosine_bwd(
    grad: Tensor, q: Tensor, k: Tensor, cu_seqlens: Tensor | None, length: int, need_q: bool, need_k: bool
) -> tuple[Tensor, Tensor]:
    """Contiguous (S,) gradient of p -> gradients of q and k, (S, D) each; (0,) where it is not needed."""
    rows, d = q.shape
    dq = launch.empty((rows, d) if need_q else (0,), q.dtype, q.device)
    dk = launch.empty((rows, d) if need_k else (0,), k.dtype, k.device)
    config = launch.config_for("cosine_bwd", q.device, D=d)
    # One row more than there are: q's last row belongs to the position after the end, and gets its zeros there.
    launch.launch(
        _cosine_bwd_kernel, (rows and cdiv(rows + 1, config["ROWS"]),), grad, q, k, cu_seqlens, dq, dk,
        rows, length, *_search(cu_seqlens), q.stride(0), k.stride(0), D=d, PACKED=cu_seqlens is not None,
        NEED_Q=need_q, NEED_K=need_k, BLOCK_D=triton.next_power_of_2(d), **config,
    )  # fmt: skip
    return dq, dk


def _search(cu_seqlens: Tensor | None) -> tuple[int, int]:
    """Index of the last entry of cu_seqlens, and how many halvings find one entry."""
    last = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return last, last.bit_length()
