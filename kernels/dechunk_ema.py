"""EMA de-chunking: an exponential moving average over the kept tokens, held until the next one, plus the residual.

A position l with a kept token moves the state to ``state_l = (1 - q_l) state_{l-1} + q_l h_l``; any other position
leaves it as it is (q_l = 0). Each sequence starts from 0, and ``out_l = state_l + residual_l``. With g the gradient of
the output, the gradient of the state runs backwards, ``R_l = g_l + (1 - q_{l+1}) R_{l+1}``, and

    dh_l = q_l R_l        dq_l = <R_l, h_l - state_{l-1}>        dgate_l = <g_l, state_l>

Every position is a map ``state -> decay state + value``, and maps compose, so the average is a scan. A sequence is cut
into chunks of CHUNK positions that start at its own start. Three passes fill the GPU however few sequences there are:

1. ``_ema_chunk_fwd_kernel`` composes the maps of each chunk into one.
2. ``_ema_carry_kernel`` walks over the chunks of each sequence and writes the state that enters each chunk.
3. ``_ema_fwd_kernel`` scans the positions of each chunk from that state, and writes the output.

Backward takes the same three passes from the other end for R: ``_ema_chunk_bwd_kernel``, ``_ema_carry_kernel`` and
``_ema_bwd_kernel``. The last one also repeats the scan of the states.

Chunks are numbered over all sequences. A grid of B sequences has cdiv(L, CHUNK) chunks each; the chunk indices of
packed sequences come from segments.py, and some belong to no chunk.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcdit.kernels import launch
from dcdit.kernels.numerics import PROB_EPS, cdiv, widest
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

_MIN_PROB = tl.constexpr(PROB_EPS)
_MAX_PROB = tl.constexpr(1.0 - PROB_EPS)


class TokenMap(NamedTuple):
    """Which position each packed token comes from, and where the sequences start on both sides."""

    packed_rows: Tensor
    """int32, shape of p, contiguous: packed row of each kept position, -1 elsewhere."""
    cu_seqlens: Tensor
    """(B + 1,) int32, contiguous: of the packed tokens."""
    source_cu_seqlens: Tensor | None
    """(B + 1,) int32, contiguous: of a packed source (S,); None for a grid (B, L)."""


@triton.jit
def _compose(decay_a, value_a, decay_b, value_b):
    """First a, then b, for maps ``state -> decay state + value``."""
    return decay_a * decay_b, decay_b * value_a + value_b


@triton.jit
def _scan(decay, value, start, REVERSE: tl.constexpr):
    """States along axis 0 after each map, from the state ``start``: decay [N], value [N, M], start [M] -> [N, M]."""
    decay = tl.broadcast_to(decay[:, None], value.shape)
    through, state = tl.associative_scan((decay, value), 0, _compose, reverse=REVERSE)
    return through * start[None, :] + state


@triton.jit
def _chunk_bounds(source_cu_ptr, sequences, length, positions, chunk_index, CHUNK: tl.constexpr):
    """First position of a chunk, the position after its last, and the position after the last of its sequence."""
    if source_cu_ptr is None:
        chunks = tl.cdiv(length, CHUNK)
        sequence = chunk_index // chunks
        end = (sequence.to(tl.int64) + 1) * length
        first = end - length + (chunk_index - sequence * chunks) * CHUNK
        # Past the last sequence a chunk is empty.
        stop = tl.minimum(tl.minimum(first + CHUNK, end), positions)
    else:
        _, first, stop, end = find_chunk(source_cu_ptr, sequences, positions, chunk_index, CHUNK)
    return first, stop, end


@triton.jit
def _load_token(p_ptr, packed_rows_ptr, position, inside):
    """Packed row of the token of each position (-1: none), and its clamped probability q (0 where there is none)."""
    packed_row = tl.load(packed_rows_ptr + position, mask=inside, other=-1)
    p = tl.load(p_ptr + position, mask=packed_row >= 0, other=0.0).to(tl.float32)
    q = tl.minimum(tl.maximum(p, _MIN_PROB), _MAX_PROB)
    return packed_row.to(tl.int64), tl.where(packed_row >= 0, q, 0.0)


@triton.jit
def _load_rows(ptr, row, stride, channel, mask):
    """Rows [N] at channels [M] in float32: [N, M]."""
    return tl.load(ptr + row[:, None] * stride + channel[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["sequences", "length", "positions"])
def _ema_chunk_fwd_kernel(
    h_ptr,  # (T, D), row stride h_stride
    p_ptr,  # (S,)
    packed_rows_ptr,  # (S,) int32
    source_cu_ptr,  # (B + 1,) int32 or None
    decay_ptr,  # (chunks,) float32, written
    value_ptr,  # (chunks, D) float32, written
    sequences, length, positions, h_stride,  # B, L (unused with source_cu), S
    D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The map of a whole chunk."""
    chunk_index = tl.program_id(0)
    first, stop, _ = _chunk_bounds(source_cu_ptr, sequences, length, positions, chunk_index, CHUNK)
    if first >= stop:
        return
    position = first + tl.arange(0, CHUNK)  # [CHUNK]
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    packed_row, q = _load_token(p_ptr, packed_rows_ptr, position, position < stop)
    _, next_q = _load_token(p_ptr, packed_rows_ptr, position + 1, position + 1 < stop)
    decay_after = tl.cumprod(1.0 - next_q, 0, reverse=True)  # [CHUNK], from a position to the end of the chunk
    h = _load_rows(h_ptr, packed_row, h_stride, channel, (packed_row >= 0)[:, None] & (channel < D)[None, :])
    chunk_index = chunk_index.to(tl.int64)
    tl.store(value_ptr + chunk_index * D + channel, tl.sum((q * decay_after)[:, None] * h, 0), mask=channel < D)
    if tl.program_id(1) == 0:
        tl.store(decay_ptr + chunk_index, tl.sum(tl.where(position == first, (1.0 - q) * decay_after, 0.0)))


@triton.jit(do_not_specialize=["sequences", "length", "positions"])
def _ema_chunk_bwd_kernel(
    grad_ptr,  # (S, D), row stride grad_stride
    p_ptr,  # (S,)
    packed_rows_ptr,  # (S,) int32
    source_cu_ptr,  # (B + 1,) int32 or None
    decay_ptr,  # (chunks,) float32, written
    value_ptr,  # (chunks, D) float32, written
    sequences, length, positions, grad_stride,  # B, L (unused with source_cu), S
    D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The map of a whole chunk for the gradient of the state, which enters the chunk at its end."""
    chunk_index = tl.program_id(0)
    first, stop, end = _chunk_bounds(source_cu_ptr, sequences, length, positions, chunk_index, CHUNK)
    if first >= stop:
        return
    position = first + tl.arange(0, CHUNK)  # [CHUNK]
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    inside = position < stop
    _, q = _load_token(p_ptr, packed_rows_ptr, position, inside & (position > first))
    _, next_q = _load_token(p_ptr, packed_rows_ptr, position + 1, inside & (position + 1 < end))
    decay_before = tl.cumprod(1.0 - q, 0)  # [CHUNK], from a position to the start of the chunk
    grad = _load_rows(grad_ptr, position, grad_stride, channel, inside[:, None] & (channel < D)[None, :])
    chunk_index = chunk_index.to(tl.int64)
    tl.store(value_ptr + chunk_index * D + channel, tl.sum(decay_before[:, None] * grad, 0), mask=channel < D)
    if tl.program_id(1) == 0:
        total = tl.cumprod(1.0 - next_q, 0, reverse=True)
        tl.store(decay_ptr + chunk_index, tl.sum(tl.where(position == first, total, 0.0)))


@triton.jit(do_not_specialize=["sequences", "length", "positions"])
def _ema_carry_kernel(
    decay_ptr,  # (chunks,) float32
    value_ptr,  # (chunks, D) float32
    source_cu_ptr,  # (B + 1,) int32 or None
    carry_ptr,  # (chunks, D) float32, written
    sequences, length, positions,  # B, L (unused with source_cu), S
    D: tl.constexpr, REVERSE: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The state that enters each chunk of a sequence, CHUNKS chunks at a time, forward or in reverse."""
    sequence = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    if source_cu_ptr is None:
        count = tl.cdiv(length, CHUNK)
        first_chunk = sequence * count
    else:
        start, end = segment_bounds(source_cu_ptr, sequence, sequences, positions)
        count = tl.cdiv(end - start, CHUNK)
        first_chunk = start // CHUNK + sequence
    carry = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for base in range(0, count, CHUNKS):
        step = base + tl.arange(0, CHUNKS)  # [CHUNKS]
        # What enters a chunk is what leaves the chunk visited before it.
        if REVERSE:
            chunk_index, before = first_chunk + count - 1 - step, first_chunk + count - step
        else:
            chunk_index, before = first_chunk + step, first_chunk + step - 1
        inside = (step < count)[:, None] & (channel < D)[None, :]  # [CHUNKS, BLOCK_D]
        has_before = (step > 0) & (step < count)
        decay = tl.load(decay_ptr + before, mask=has_before, other=1.0)
        value = _load_rows(value_ptr, before, D, channel, inside & has_before[:, None])
        state = _scan(decay, value, carry, False)
        tl.store(carry_ptr + chunk_index[:, None] * D + channel[None, :], state, mask=inside)
        carry = tl.sum(tl.where((step == base + CHUNKS - 1)[:, None], state, 0.0), 0)


@triton.jit(do_not_specialize=["sequences", "length", "positions"])
def _ema_fwd_kernel(
    h_ptr,  # (T, D), row stride h_stride
    p_ptr,  # (S,)
    packed_rows_ptr,  # (S,) int32
    source_cu_ptr,  # (B + 1,) int32 or None
    carry_ptr,  # (chunks, D) float32
    residual_ptr,  # (S, D), row stride residual_stride, or None
    out_ptr,  # (S, D), written
    sequences, length, positions, h_stride, residual_stride,  # B, L (unused with source_cu), S
    D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The output of a chunk."""
    chunk_index = tl.program_id(0)
    first, stop, _ = _chunk_bounds(source_cu_ptr, sequences, length, positions, chunk_index, CHUNK)
    if first >= stop:
        return
    position = first + tl.arange(0, CHUNK)  # [CHUNK]
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    inside = (position < stop)[:, None] & (channel < D)[None, :]  # [CHUNK, BLOCK_D]
    packed_row, q = _load_token(p_ptr, packed_rows_ptr, position, position < stop)
    value = q[:, None] * _load_rows(
        h_ptr, packed_row, h_stride, channel, (packed_row >= 0)[:, None] & (channel < D)[None, :]
    )  # [CHUNK, BLOCK_D]
    carry = tl.load(carry_ptr + chunk_index.to(tl.int64) * D + channel, mask=channel < D, other=0.0)
    out = _scan(1.0 - q, value, carry, False)
    if residual_ptr is not None:
        out += _load_rows(residual_ptr, position, residual_stride, channel, inside)
    tl.store(out_ptr + position[:, None] * D + channel[None, :], out, mask=inside)


@triton.jit(do_not_specialize=["sequences", "length", "positions", "tokens"])
def _ema_bwd_kernel(
    grad_ptr,  # (S, D), row stride grad_stride
    h_ptr,  # (T, D), row stride h_stride
    p_ptr,  # (S,)
    packed_rows_ptr,  # (S,) int32
    source_cu_ptr,  # (B + 1,) int32 or None
    token_cu_ptr,  # (B + 1,) int32
    carry_ptr,  # (chunks, D) float32, or None if neither p nor the gate wants a gradient
    grad_carry_ptr,  # (chunks, D) float32, or None if neither p nor h wants a gradient
    grad_h_ptr,  # (T, D), written, or None
    p_part_ptr,  # (slices of D, S) float32, written, or None
    gate_part_ptr,  # (slices of D, S) float32, written, or None
    sequences, length, positions, tokens, grad_stride, h_stride,  # B, L (unused with source_cu), S, T
    D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients of a chunk; those of p and of the gate are parts, one for each slice of the channels."""
    chunk_index = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    offset = tl.arange(0, CHUNK)  # [CHUNK]
    if grad_h_ptr is not None:
        # No position leads to a padding row, so each program clears CHUNK of them.
        padding = tl.maximum(tl.load(token_cu_ptr + sequences), 0) + chunk_index.to(tl.int64) * CHUNK + offset
        cleared = (padding < tokens)[:, None] & (channel < D)[None, :]
        zeros = tl.zeros((CHUNK, BLOCK_D), tl.float32)
        tl.store(grad_h_ptr + padding[:, None] * D + channel[None, :], zeros, mask=cleared)
    first, stop, end = _chunk_bounds(source_cu_ptr, sequences, length, positions, chunk_index, CHUNK)
    if first >= stop:
        return
    position = first + offset
    inside = position < stop
    part_offset = tl.program_id(1).to(tl.int64) * positions + position
    carry_offset = chunk_index.to(tl.int64) * D + channel
    packed_row, q = _load_token(p_ptr, packed_rows_ptr, position, inside)
    kept = (packed_row >= 0)[:, None] & (channel < D)[None, :]  # [CHUNK, BLOCK_D]
    grad = _load_rows(grad_ptr, position, grad_stride, channel, inside[:, None] & (channel < D)[None, :])
    if grad_carry_ptr is not None:
        _, next_q = _load_token(p_ptr, packed_rows_ptr, position + 1, inside & (position + 1 < end))
        grad_carry = tl.load(grad_carry_ptr + carry_offset, mask=channel < D, other=0.0)
        grad_state = _scan(1.0 - next_q, grad, grad_carry, True)  # R
    if grad_h_ptr is not None:
        tl.store(grad_h_ptr + packed_row[:, None] * D + channel[None, :], q[:, None] * grad_state, mask=kept)
    if carry_ptr is not None:
        h = _load_rows(h_ptr, packed_row, h_stride, channel, kept)
        # The state before each position: the scan of the forward, one position late.
        packed_row_before, q_before = _load_token(p_ptr, packed_rows_ptr, position - 1, inside & (position > first))
        kept_before = (packed_row_before >= 0)[:, None] & (channel < D)[None, :]
        h_before = _load_rows(h_ptr, packed_row_before, h_stride, channel, kept_before)
        carry = tl.load(carry_ptr + carry_offset, mask=channel < D, other=0.0)
        state_before = _scan(1.0 - q_before, q_before[:, None] * h_before, carry, False)
        if p_part_ptr is not None:
            p = tl.load(p_ptr + position, mask=packed_row >= 0, other=0.0).to(tl.float32)
            unclamped = (p >= _MIN_PROB) & (p <= _MAX_PROB)
            grad_p = tl.where(unclamped, tl.sum(grad_state * (h - state_before), 1), 0.0)
            tl.store(p_part_ptr + part_offset, grad_p, mask=inside)
        if gate_part_ptr is not None:
            state = (1.0 - q)[:, None] * state_before + q[:, None] * h
            tl.store(gate_part_ptr + part_offset, tl.sum(grad * state, 1), mask=inside)


@triton.jit(do_not_specialize=["positions"])
def _sum_parts_kernel(
    part_ptr,  # (PARTS, S) float32
    out_ptr,  # (S,), written
    positions,  # S
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(PARTS):
        total += tl.load(part_ptr + position, mask=position < positions, other=0.0)
        part_ptr += positions
    tl.store(out_ptr + position, total, mask=position < positions)


def dechunk_ema_fwd(h: Tensor, p: Tensor, residual: Tensor | None, token_map: TokenMap) -> Tensor:
    """Smooth, hold and add: (S, D) in the wider dtype of h and residual.

    Args:
        h: (T, D) packed tokens with a unit last stride.
        p: contiguous (B, L), or (S,) of a packed source.
        residual: (S, D) with a unit last stride.
        token_map: of the selection.
    """
    positions, d = p.numel(), h.shape[1]
    config = launch.config_for("dechunk_ema", h.device, D=d)
    sequences, length, chunks = counts = _count_chunks(p, token_map, config["CHUNK"])
    carry = _entering_states(_ema_chunk_fwd_kernel, h, p, token_map, counts, config, reverse=False)
    out = launch.empty((positions, d), widest(h, residual), h.device)
    launch.launch(
        _ema_fwd_kernel, (chunks, cdiv(d, config["BLOCK_D"])),
        h, p, token_map.packed_rows, token_map.source_cu_seqlens, carry, residual, out, sequences, length, positions,
        h.stride(0), 0 if residual is None else residual.stride(0), D=d, **config,
    )  # fmt: skip
    return out


def dechunk_ema_bwd(
    grad: Tensor, h: Tensor, p: Tensor, token_map: TokenMap, want_h: bool, want_p: bool, want_gate: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of h (T, D), of p and of the gate (float32, p's shape), None where not wanted.

    Args:
        grad: (S, D) with a unit last stride.
        h, p, token_map: as in the forward.
    """
    packed_rows, cu_seqlens, source_cu_seqlens = token_map
    (tokens, d), positions, device = h.shape, p.numel(), h.device
    config = launch.config_for("dechunk_ema_bwd", device, D=d)
    chunk_config = launch.config_for("dechunk_ema", device, D=d)
    chunk = chunk_config["CHUNK"]
    sequences, length, chunks = counts = _count_chunks(p, token_map, chunk)
    parts = cdiv(d, config["BLOCK_D"])
    carry = grad_carry = None
    if want_p or want_gate:
        carry = _entering_states(_ema_chunk_fwd_kernel, h, p, token_map, counts, chunk_config, reverse=False)
    if want_p or want_h:
        grad_carry = _entering_states(_ema_chunk_bwd_kernel, grad, p, token_map, counts, chunk_config, reverse=True)
    grad_h = launch.empty((tokens, d), h.dtype, device) if want_h else None
    p_part, gate_part = (
        launch.empty((parts, positions), torch.float32, device) if wanted else None for wanted in (want_p, want_gate)
    )
    launch.launch(
        # A capacity above the number of positions needs more programs to clear the padding.
        _ema_bwd_kernel, (max(chunks, cdiv(tokens, chunk)), parts),
        grad, h, p, packed_rows, source_cu_seqlens, cu_seqlens, carry, grad_carry, grad_h, p_part, gate_part,
        sequences, length, positions, tokens, grad.stride(0), h.stride(0), D=d, CHUNK=chunk, **config,
    )  # fmt: skip
    return grad_h, _sum_parts(p_part, p, p.dtype), _sum_parts(gate_part, p, torch.float32)


def _count_chunks(p: Tensor, token_map: TokenMap, chunk: int) -> tuple[int, int, int]:
    """Sequences, positions of each (unused for a packed source), and chunk indices of all."""
    if token_map.source_cu_seqlens is None:
        sequences, length = p.shape
        # Without a position there is nothing to visit. The length is a divisor.
        return (sequences, length, sequences * cdiv(length, chunk)) if length else (0, 1, 0)
    sequences = token_map.source_cu_seqlens.shape[0] - 1
    return sequences, 1, max_chunks(p.shape[0], sequences, chunk)


def _entering_states(
    chunk_kernel: Any, x: Tensor, p: Tensor, token_map: TokenMap, counts: tuple[int, int, int], config: dict[str, int],
    reverse: bool,
) -> Tensor:  # fmt: skip
    """The float32 state that enters each chunk: (chunks, D). x has the rows that ``chunk_kernel`` reads."""
    d, device = x.shape[1], x.device
    carry_config = launch.config_for("dechunk_ema_carry", device, D=d)
    sequences, length, chunks = counts
    decay = launch.empty((chunks,), torch.float32, device)
    value, carry = launch.empty((chunks, d), torch.float32, device), launch.empty((chunks, d), torch.float32, device)
    source_cu_seqlens = token_map.source_cu_seqlens
    launch.launch(
        chunk_kernel, (chunks, cdiv(d, config["BLOCK_D"])), x, p, token_map.packed_rows, source_cu_seqlens, decay,
        value, sequences, length, p.numel(), x.stride(0), D=d, **config,
    )  # fmt: skip
    launch.launch(
        _ema_carry_kernel, (sequences, cdiv(d, carry_config["BLOCK_D"])), decay, value, source_cu_seqlens, carry,
        sequences, length, p.numel(), D=d, REVERSE=reverse, CHUNK=config["CHUNK"], **carry_config,
    )  # fmt: skip
    return carry


def _sum_parts(parts: Tensor | None, p: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The sum over the parts, in p's shape."""
    if parts is None:
        return None
    out = launch.empty(p.shape, dtype, p.device)
    config = launch.config_for("dechunk_ema_sum", p.device)
    grid = (cdiv(p.numel(), config["BLOCK"]),)
    launch.launch(_sum_parts_kernel, grid, parts, out, p.numel(), PARTS=parts.shape[0], **config)
    return out
