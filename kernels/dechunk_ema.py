"""EMA de-chunking at full resolution: scan over the kept tokens, hold, residual, in one pass over the positions.

A position with a kept token maps the state ``s -> (1 - q) s + q h``, any other leaves it alone. Sequences are cut into
chunks that start at the sequence's own start. Three steps fill the GPU however few sequences there are: the map of each
chunk as a whole, the state that enters each chunk, then the positions inside each chunk. The gradient runs through the
same three steps from the other end: ``R_l = g_l + (1 - q_{l+1}) R_{l+1}``, with R the gradient of the state at l.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcdit.kernels import launch
from dcdit.kernels.numerics import PROB_EPS, cdiv
from dcdit.kernels.segments import find_chunk, max_chunks, segment_bounds

launch.set_default_configs(
    "dechunk_ema",
    D={
        32: {"CHUNK": 32, "BLOCK_D": 32, "num_warps": 1},
        1024: {"CHUNK": 32, "BLOCK_D": 64, "num_warps": 1},
    },
)
launch.set_default_configs("dechunk_ema_bwd", D={1024: {"BLOCK_D": 32, "num_warps": 1}})
launch.set_default_configs("dechunk_ema_carry", D={1024: {"CHUNKS": 64, "BLOCK_D": 32, "num_warps": 4}})
launch.set_default_configs("dechunk_ema_sum", {"BLOCK": 256, "num_warps": 4})

_LEAST = tl.constexpr(PROB_EPS)
_MOST = tl.constexpr(1.0 - PROB_EPS)


@triton.jit
def _compose(decay_a, value_a, decay_b, value_b):
    """First a, then b, for maps ``s -> decay s + value``."""
    return decay_a * decay_b, decay_b * value_a + value_b


@triton.jit
def _scan(decay, value, start, REVERSE: tl.constexpr):
    """States along axis 0 after each map, from the state ``start``: decay [N], value [N, M], start [M] -> [N, M]."""
    decay = tl.broadcast_to(decay[:, None], value.shape)
    through, state = tl.associative_scan((decay, value), 0, _compose, reverse=REVERSE)
    return through * start[None, :] + state


@triton.jit
def _locate(cu_ptr, sequences, length, rows, slot, CHUNK: tl.constexpr):
    """The chunk of a slot: first position, the one after its last, and the end of its sequence."""
    if cu_ptr is None:
        chunks = tl.cdiv(length, CHUNK)
        sequence = slot // chunks
        end = (sequence.to(tl.int64) + 1) * length
        first = end - length + (slot - sequence * chunks) * CHUNK
        # Programs past the last sequence find nothing.
        last = tl.minimum(tl.minimum(first + CHUNK, end), rows)
    else:
        _, first, last, end = find_chunk(cu_ptr, sequences, rows, slot, CHUNK)
    return first, last, end


@triton.jit
def _token(p_ptr, slot_ptr, position, inside):
    """Packed row of each position's token (-1: none), and its confidence q (0 where there is none)."""
    row = tl.load(slot_ptr + position, mask=inside, other=-1)
    p = tl.load(p_ptr + position, mask=row >= 0, other=0.0).to(tl.float32)
    q = tl.minimum(tl.maximum(p, _LEAST), _MOST)
    return row.to(tl.int64), tl.where(row >= 0, q, 0.0)


@triton.jit
def _rows(ptr, row, stride, col, mask):
    return tl.load(ptr + row[:, None] * stride + col[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["sequences", "length", "rows"])
def _ema_chunk_fwd_kernel(
    h_ptr, p_ptr, slot_ptr, cu_ptr, decay_ptr, value_ptr, sequences, length, rows, h_stride,
    D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The map of a whole chunk."""
    slot = tl.program_id(0)
    first, last, _ = _locate(cu_ptr, sequences, length, rows, slot, CHUNK)
    if first >= last:
        return
    position = first + tl.arange(0, CHUNK)  # [CHUNK]
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    row, q = _token(p_ptr, slot_ptr, position, position < last)
    _, next_q = _token(p_ptr, slot_ptr, position + 1, position + 1 < last)
    left = tl.cumprod(1.0 - next_q, 0, reverse=True)  # what the rest of the chunk leaves of each token
    h = _rows(h_ptr, row, h_stride, col, (row >= 0)[:, None] & (col < D)[None, :])
    slot = slot.to(tl.int64)
    tl.store(value_ptr + slot * D + col, tl.sum((q * left)[:, None] * h, 0), mask=col < D)
    if tl.program_id(1) == 0:
        tl.store(decay_ptr + slot, tl.sum(tl.where(position == first, (1.0 - q) * left, 0.0)))


@triton.jit(do_not_specialize=["sequences", "length", "rows"])
def _ema_chunk_bwd_kernel(
    grad_ptr, p_ptr, slot_ptr, cu_ptr, decay_ptr, value_ptr, sequences, length, rows, grad_stride,
    D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The map of a whole chunk for the gradient of the state, which enters at its end."""
    slot = tl.program_id(0)
    first, last, end = _locate(cu_ptr, sequences, length, rows, slot, CHUNK)
    if first >= last:
        return
    position = first + tl.arange(0, CHUNK)  # [CHUNK]
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    inside = position < last
    _, q = _token(p_ptr, slot_ptr, position, inside & (position > first))
    _, next_q = _token(p_ptr, slot_ptr, position + 1, inside & (position + 1 < end))
    left = tl.cumprod(1.0 - q, 0)  # [CHUNK]
    grad = _rows(grad_ptr, position, grad_stride, col, inside[:, None] & (col < D)[None, :])
    slot = slot.to(tl.int64)
    tl.store(value_ptr + slot * D + col, tl.sum(left[:, None] * grad, 0), mask=col < D)
    if tl.program_id(1) == 0:
        total = tl.cumprod(1.0 - next_q, 0, reverse=True)
        tl.store(decay_ptr + slot, tl.sum(tl.where(position == first, total, 0.0)))


@triton.jit(do_not_specialize=["sequences", "length", "rows"])
def _ema_carry_kernel(
    decay_ptr, value_ptr, cu_ptr, carry_ptr, sequences, length, rows,
    D: tl.constexpr, REVERSE: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The state that enters each chunk of a sequence, walking forward or in reverse."""
    sequence = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    if cu_ptr is None:
        count = tl.cdiv(length, CHUNK)
        first = sequence * count
    else:
        start, end = segment_bounds(cu_ptr, sequence, sequences, rows)
        count = tl.cdiv(end - start, CHUNK)
        first = start // CHUNK + sequence
    carry = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for base in range(0, count, CHUNKS):
        step = base + tl.arange(0, CHUNKS)  # [CHUNKS]
        # What enters a chunk is what leaves the one before it on the walk.
        if REVERSE:
            slot, before = first + count - 1 - step, first + count - step
        else:
            slot, before = first + step, first + step - 1
        inside = (step < count)[:, None] & (col < D)[None, :]
        known = (step > 0) & (step < count)
        decay = tl.load(decay_ptr + before, mask=known, other=1.0)
        value = _rows(value_ptr, before, D, col, inside & known[:, None])
        state = _scan(decay, value, carry, False)
        tl.store(carry_ptr + slot[:, None] * D + col[None, :], state, mask=inside)
        carry = tl.sum(tl.where((step == base + CHUNKS - 1)[:, None], state, 0.0), 0)


@triton.jit(do_not_specialize=["sequences", "length", "rows"])
def _ema_fwd_kernel(
    h_ptr, p_ptr, slot_ptr, cu_ptr, carry_ptr, residual_ptr, out_ptr, sequences, length, rows,
    h_stride, residual_stride,
    D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    first, last, _ = _locate(cu_ptr, sequences, length, rows, slot, CHUNK)
    if first >= last:
        return
    position = first + tl.arange(0, CHUNK)  # [CHUNK]
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    inside = (position < last)[:, None] & (col < D)[None, :]
    row, q = _token(p_ptr, slot_ptr, position, position < last)
    value = q[:, None] * _rows(h_ptr, row, h_stride, col, (row >= 0)[:, None] & (col < D)[None, :])
    carry = tl.load(carry_ptr + slot.to(tl.int64) * D + col, mask=col < D, other=0.0)
    out = _scan(1.0 - q, value, carry, False)
    if residual_ptr is not None:
        out += _rows(residual_ptr, position, residual_stride, col, inside)
    tl.store(out_ptr + position[:, None] * D + col[None, :], out, mask=inside)


@triton.jit(do_not_specialize=["sequences", "length", "rows", "tokens"])
def _ema_bwd_kernel(
    grad_ptr, h_ptr, p_ptr, slot_ptr, cu_ptr, token_cu_ptr, carry_ptr, grad_carry_ptr,
    grad_h_ptr, p_part_ptr, gate_part_ptr, sequences, length, rows, tokens, grad_stride, h_stride,
    D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    offset = tl.arange(0, CHUNK)  # [CHUNK]
    if grad_h_ptr is not None:
        # No position leads to a padding row, so every program clears its share of them.
        padding = tl.maximum(tl.load(token_cu_ptr + sequences), 0) + slot.to(tl.int64) * CHUNK + offset
        cleared = (padding < tokens)[:, None] & (col < D)[None, :]
        tl.store(grad_h_ptr + padding[:, None] * D + col[None, :], tl.zeros((CHUNK, BLOCK_D), tl.float32), mask=cleared)
    first, last, end = _locate(cu_ptr, sequences, length, rows, slot, CHUNK)
    if first >= last:
        return
    position = first + offset
    inside = position < last
    part = tl.program_id(1).to(tl.int64) * rows + position
    state_at = slot.to(tl.int64) * D + col
    row, q = _token(p_ptr, slot_ptr, position, inside)
    kept = (row >= 0)[:, None] & (col < D)[None, :]
    grad = _rows(grad_ptr, position, grad_stride, col, inside[:, None] & (col < D)[None, :])
    if grad_carry_ptr is not None:
        _, next_q = _token(p_ptr, slot_ptr, position + 1, inside & (position + 1 < end))
        entering = tl.load(grad_carry_ptr + state_at, mask=col < D, other=0.0)
        grad_state = _scan(1.0 - next_q, grad, entering, True)
    if grad_h_ptr is not None:
        tl.store(grad_h_ptr + row[:, None] * D + col[None, :], q[:, None] * grad_state, mask=kept)
    if carry_ptr is not None:
        h = _rows(h_ptr, row, h_stride, col, kept)
        # The state before each position: the same scan, one position late.
        row_before, q_before = _token(p_ptr, slot_ptr, position - 1, inside & (position > first))
        value = _rows(h_ptr, row_before, h_stride, col, (row_before >= 0)[:, None] & (col < D)[None, :])
        carry = tl.load(carry_ptr + state_at, mask=col < D, other=0.0)
        before = _scan(1.0 - q_before, q_before[:, None] * value, carry, False)
        if p_part_ptr is not None:
            p = tl.load(p_ptr + position, mask=row >= 0, other=0.0).to(tl.float32)
            slope = tl.where((p >= _LEAST) & (p <= _MOST), tl.sum(grad_state * (h - before), 1), 0.0)
            tl.store(p_part_ptr + part, slope, mask=inside)
        if gate_part_ptr is not None:
            held = (1.0 - q)[:, None] * before + q[:, None] * h
            tl.store(gate_part_ptr + part, tl.sum(grad * held, 1), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _sum_parts_kernel(part_ptr, out_ptr, rows, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(PARTS):
        total += tl.load(part_ptr + position, mask=position < rows, other=0.0)
        part_ptr += rows
    tl.store(out_ptr + position, total, mask=position < rows)


def dechunk_ema_fwd(
    h: Tensor, p: Tensor, packed_rows: Tensor, source_cu_seqlens: Tensor | None, residual: Tensor | None
) -> Tensor:
    """Smooth, hold and add: (S, D) in h's dtype.

    Args:
        h: (T, D) packed tokens with a unit last stride.
        p: contiguous (B, L), or (S,) with source_cu_seqlens.
        packed_rows: contiguous int32, p's shape: packed row of each kept position, -1 elsewhere.
        source_cu_seqlens: int32 (B+1,) of a packed source.
        residual: (S, D) with a unit last stride.
    """
    rows, d = p.numel(), h.shape[1]
    config = launch.config_for("dechunk_ema", h.device, D=d)
    sequences, length, chunks = _cut(p, source_cu_seqlens, config["CHUNK"])
    carry = _enter(_ema_chunk_fwd_kernel, h, p, packed_rows, source_cu_seqlens, reverse=False)
    out = launch.empty((rows, d), h.dtype, h.device)
    launch.launch(
        _ema_fwd_kernel, (chunks, cdiv(d, config["BLOCK_D"])),
        h, p, packed_rows, source_cu_seqlens, carry, residual, out, sequences, length, rows,
        h.stride(0), 0 if residual is None else residual.stride(0), D=d, **config,
    )  # fmt: skip
    return out


def dechunk_ema_bwd(
    grad: Tensor, h: Tensor, p: Tensor, packed_rows: Tensor, cu_seqlens: Tensor, source_cu_seqlens: Tensor | None,
    want_h: bool, want_p: bool, want_gate: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of h (T, D), of p and of the gate (float32, p's shape); whatever is not wanted comes back empty.

    Args:
        grad: (S, D) with a unit last stride.
        h, p, packed_rows, source_cu_seqlens: as in the forward.
        cu_seqlens: int32 (B+1,) of the packed tokens.
    """
    (tokens, d), rows, device = h.shape, p.numel(), h.device
    config, chunk = (
        launch.config_for("dechunk_ema_bwd", device, D=d),
        launch.config_for("dechunk_ema", device, D=d)["CHUNK"],
    )
    sequences, length, chunks = _cut(p, source_cu_seqlens, chunk)
    parts = cdiv(d, config["BLOCK_D"])
    carry = grad_carry = None
    if want_p or want_gate:
        carry = _enter(_ema_chunk_fwd_kernel, h, p, packed_rows, source_cu_seqlens, reverse=False)
    if want_p or want_h:
        grad_carry = _enter(_ema_chunk_bwd_kernel, grad, p, packed_rows, source_cu_seqlens, reverse=True)
    grad_h = launch.empty((tokens, d) if want_h else (0,), h.dtype, device)
    p_part, gate_part = (
        launch.empty((parts, rows), torch.float32, device) if wanted else None for wanted in (want_p, want_gate)
    )
    launch.launch(
        # A capacity above the number of positions needs more programs to clear the padding.
        _ema_bwd_kernel, (max(chunks, cdiv(tokens, chunk)), parts),
        grad, h, p, packed_rows, source_cu_seqlens, cu_seqlens, carry, grad_carry,
        grad_h if want_h else None, p_part, gate_part, sequences, length, rows, tokens, grad.stride(0), h.stride(0),
        D=d, CHUNK=chunk, **config,
    )  # fmt: skip
    return grad_h, _sum_parts(p_part, p, p.dtype), _sum_parts(gate_part, p, torch.float32)


def _cut(p: Tensor, source_cu_seqlens: Tensor | None, chunk: int) -> tuple[int, int, int]:
    """Sequences, positions of each (unused where they differ), and chunks of all."""
    if source_cu_seqlens is None:
        return p.shape[0], max(p.shape[1], 1), p.shape[0] * cdiv(p.shape[1], chunk)
    sequences = source_cu_seqlens.shape[0] - 1
    return sequences, 1, max_chunks(p.shape[0], sequences, chunk)


def _enter(
    chunk_kernel: Any, x: Tensor, p: Tensor, packed_rows: Tensor, source_cu_seqlens: Tensor | None, reverse: bool
) -> Tensor:
    """The float32 state that enters each chunk: (chunks, D)."""
    d, device = x.shape[1], x.device
    config, combining = (
        launch.config_for("dechunk_ema", device, D=d),
        launch.config_for("dechunk_ema_carry", device, D=d),
    )
    sequences, length, chunks = _cut(p, source_cu_seqlens, config["CHUNK"])
    decay = launch.empty((chunks,), torch.float32, device)
    value, carry = launch.empty((chunks, d), torch.float32, device), launch.empty((chunks, d), torch.float32, device)
    launch.launch(
        chunk_kernel, (chunks, cdiv(d, config["BLOCK_D"])), x, p, packed_rows, source_cu_seqlens, decay, value,
        sequences, length, p.numel(), x.stride(0), D=d, **config,
    )  # fmt: skip
    launch.launch(
        _ema_carry_kernel, (sequences, cdiv(d, combining["BLOCK_D"])), decay, value, source_cu_seqlens, carry,
        sequences, length, p.numel(),
        D=d, REVERSE=reverse, CHUNK=config["CHUNK"], **combining,
    )  # fmt: skip
    return carry


def _sum_parts(parts: Tensor | None, p: Tensor, dtype: torch.dtype) -> Tensor:
    if parts is None:
        return launch.empty((0,), dtype, p.device)
    out = launch.empty(p.shape, dtype, p.device)
    config = launch.config_for("dechunk_ema_sum", p.device)
    grid = (cdiv(p.numel(), config["BLOCK"]),)
    launch.launch(_sum_parts_kernel, grid, parts, out, p.numel(), PARTS=parts.shape[0], **config)
    return out
