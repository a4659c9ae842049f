"""adaLN on packed tokens: gated residual and modulated LayerNorm, one pass over the tokens for either or both.

A program handles consecutive rows of one image, whole rows in registers, so it loads that image's modulation once.
Absent halves are None pointers, which Triton compiles away.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcdit.kernels import launch
from dcdit.kernels.numerics import cdiv, next_power_of_2
from dcdit.kernels.segments import find_chunk, max_chunks, segment_bounds

launch.set_default_configs(
    "modulation_fwd",
    D={
        64: {"ROWS": 8, "num_warps": 4},
        384: {"ROWS": 4, "num_warps": 4},
        1024: {"ROWS": 4, "num_warps": 8},
    },
)
launch.set_default_configs(
    "modulation_bwd",
    D={
        64: {"CHUNK": 16, "ROWS": 8, "num_warps": 2},
        1024: {"CHUNK": 16, "ROWS": 1, "num_warps": 4},
        1152: {"CHUNK": 16, "ROWS": 1, "num_warps": 8},
    },
)
launch.set_default_configs("modulation_sum", D={1024: {"CHUNKS": 8, "BLOCK": 128, "num_warps": 4}})


@triton.jit(do_not_specialize=["rows", "images"])
def _modulation_fwd_kernel(
    x_ptr, y_ptr, gate_ptr, shift_ptr, scale_ptr, cu_ptr, added_ptr, normed_ptr, stats_ptr, rows, images,
    x_stride, y_stride, gate_stride, shift_stride, scale_stride, eps,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    image, first, last, _ = find_chunk(cu_ptr, images, rows, tl.program_id(0), ROWS)
    if first >= last:
        return
    row = first + tl.arange(0, ROWS)  # [ROWS]
    col = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    inside = (row < last)[:, None] & (col < D)[None, :]
    # Padding rows have no image: their modulation reads as zero, and y is never touched.
    modulated = (col < D) & (image < images)
    real = inside & (image < images)
    image = image.to(tl.int64)
    x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    if y_ptr is not None:
        gate = tl.load(gate_ptr + image * gate_stride + col, mask=modulated, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + row[:, None] * y_stride + col[None, :], mask=real, other=0.0).to(tl.float32)
        stored = (x + gate[None, :] * y).to(added_ptr.dtype.element_ty)
        tl.store(added_ptr + row[:, None] * D + col[None, :], stored, mask=inside)
        x = stored.to(tl.float32)
    if normed_ptr is not None:
        shift = tl.load(shift_ptr + image * shift_stride + col, mask=modulated, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + image * scale_stride + col, mask=modulated, other=0.0).to(tl.float32)
        mean = tl.sum(x, 1) / D
        centred = tl.where(inside, x - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
        normed = centred * rstd[:, None] * (1.0 + scale[None, :]) + shift[None, :]
        tl.store(normed_ptr + row[:, None] * D + col[None, :], tl.where(real, normed, 0.0), mask=inside)
        tl.store(stats_ptr + row, mean, mask=row < last)
        tl.store(stats_ptr + rows + row, rstd, mask=row < last)


@triton.jit(do_not_specialize=["rows", "images"])
def _modulation_bwd_kernel(
    grad_added_ptr, grad_normed_ptr, added_ptr, y_ptr, gate_ptr, scale_ptr, stats_ptr, cu_ptr,
    grad_x_ptr, grad_y_ptr, partial_ptr, rows, images,
    grad_added_stride, grad_normed_stride, added_stride, y_stride, gate_stride, scale_stride,
    D: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    image, first, last, _ = find_chunk(cu_ptr, images, rows, slot, CHUNK)
    if first >= last:
        return
    col = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    is_real = image < images
    modulated = (col < D) & is_real
    image = image.to(tl.int64)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + image * gate_stride + col, mask=modulated, other=0.0).to(tl.float32)
    if grad_normed_ptr is not None:
        scale = tl.load(scale_ptr + image * scale_stride + col, mask=modulated, other=0.0).to(tl.float32)
    shift_sum = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    scale_sum = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    gate_sum = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)  # [ROWS]
        inside = (row < last)[:, None] & (col < D)[None, :]
        real = inside & is_real
        if grad_added_ptr is None:
            grad = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
        else:
            grad = tl.load(grad_added_ptr + row[:, None] * grad_added_stride + col[None, :], mask=inside, other=0.0)
            grad = grad.to(tl.float32)
        if grad_normed_ptr is not None:
            outer = tl.load(grad_normed_ptr + row[:, None] * grad_normed_stride + col[None, :], mask=real, other=0.0)
            outer = outer.to(tl.float32)
            x = tl.load(added_ptr + row[:, None] * added_stride + col[None, :], mask=real, other=0.0).to(tl.float32)
            mean = tl.load(stats_ptr + row, mask=(row < last) & is_real, other=0.0)
            rstd = tl.load(stats_ptr + rows + row, mask=(row < last) & is_real, other=0.0)
            unit = tl.where(real, (x - mean[:, None]) * rstd[:, None], 0.0)
            shift_sum += outer
            scale_sum += outer * unit
            inner = outer * (1.0 + scale[None, :])
            along_mean = tl.sum(inner, 1) / D
            along_unit = tl.sum(inner * unit, 1) / D
            grad += (inner - along_mean[:, None] - unit * along_unit[:, None]) * rstd[:, None]
        if grad_x_ptr is not None:
            tl.store(grad_x_ptr + row[:, None] * D + col[None, :], grad, mask=inside)
        if grad_y_ptr is not None:
            grad_y = tl.where(real, grad * gate[None, :], 0.0)
            tl.store(grad_y_ptr + row[:, None] * D + col[None, :], grad_y, mask=inside)
        if y_ptr is not None:
            y = tl.load(y_ptr + row[:, None] * y_stride + col[None, :], mask=real, other=0.0).to(tl.float32)
            gate_sum += grad * y
    if partial_ptr is not None:
        partial_ptr += slot.to(tl.int64) * (PARTS * D) + col
        if PARTS >= 2:
            tl.store(partial_ptr, tl.sum(shift_sum, 0), mask=modulated)
            tl.store(partial_ptr + D, tl.sum(scale_sum, 0), mask=modulated)
        if y_ptr is not None:
            tl.store(partial_ptr + (PARTS - 1) * D, tl.sum(gate_sum, 0), mask=modulated)


@triton.jit(do_not_specialize=["rows", "images"])
def _sum_chunks_kernel(
    partial_ptr, cu_ptr, out_ptr, rows, images,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    start, end = segment_bounds(cu_ptr, image, images, rows)
    slot = start // CHUNK + image
    chunks = tl.cdiv(end - start, CHUNK)
    total = tl.zeros((CHUNKS, BLOCK), dtype=tl.float32)
    for base in range(0, chunks, CHUNKS):
        chunk = base + tl.arange(0, CHUNKS)  # [CHUNKS]
        inside = (chunk < chunks)[:, None] & (col < WIDTH)[None, :]
        total += tl.load(partial_ptr + (slot + chunk)[:, None] * WIDTH + col[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + image * WIDTH + col, tl.sum(total, 0), mask=col < WIDTH)


def modulated_layer_norm_fwd(
    t: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(T, D) rows and (B, D) modulation with unit last strides -> normed (T, D), float32 mean and 1/std (2, T)."""
    normed, stats = launch.empty(t.shape, t.dtype, t.device), launch.empty((2, t.shape[0]), torch.float32, t.device)
    _forward(t, None, None, shift, scale, cu_seqlens, None, normed, stats, eps)
    return normed, stats


def gated_add_fwd(x: Tensor, y: Tensor, gate: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(T, D) rows and (B, D) gate with unit last strides -> (T, D)."""
    added = launch.empty(x.shape, x.dtype, x.device)
    _forward(x, y, gate, None, None, cu_seqlens, added, None, None, 0.0)
    return added


def gated_add_modulated_layer_norm_fwd(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Both of the above in one pass: the sum (T, D), its norm (T, D), float32 mean and 1/std (2, T)."""
    added, normed = launch.empty(x.shape, x.dtype, x.device), launch.empty(x.shape, x.dtype, x.device)
    stats = launch.empty((2, x.shape[0]), torch.float32, x.device)
    _forward(x, y, gate, shift, scale, cu_seqlens, added, normed, stats, eps)
    return added, normed, stats


def _forward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, cu_seqlens: Tensor,
    added: Tensor | None, normed: Tensor | None, stats: Tensor | None, eps: float,
) -> None:  # fmt: skip
    (rows, d), images = x.shape, cu_seqlens.shape[0] - 1
    config = launch.config_for("modulation_fwd", x.device, D=d)
    launch.launch(
        _modulation_fwd_kernel, (max_chunks(rows, images, config["ROWS"]),),
        x, y, gate, shift, scale, cu_seqlens, added, normed, stats, rows, images,
        *(_row_stride(tensor) for tensor in (x, y, gate, shift, scale)), eps,
        D=d, BLOCK_D=next_power_of_2(d), **config,
    )  # fmt: skip


def modulation_bwd(
    grad_added: Tensor | None, grad_normed: Tensor | None, added: Tensor, y: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, stats: Tensor | None, cu_seqlens: Tensor, want_x: bool, want_y: bool, want_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of all three operations; whatever is not wanted comes back empty.

    Args:
        grad_added: gradient of the sum (T, D), None if nothing reads it.
        grad_normed: gradient of the norm (T, D), None if nothing reads it; then scale and stats are None too.
        added: what was normed (T, D); without a norm it only tells shape and dtype.
        y: what was gated (T, D), if the gate's gradient is wanted.
        gate: (B, D), None if nothing was added.
        scale, stats: (B, D) and what the forward returned.
        want_x, want_y, want_norm: compute the gradients of x; of y; of shift and scale.

    Returns:
        Gradients of x and y (T, D), and (B, parts, D) in the modulation's dtype: shift and scale if wanted, then the
        gate if wanted.
    """
    (rows, d), images, device = added.shape, cu_seqlens.shape[0] - 1, added.device
    parts = 2 * want_norm + (y is not None)
    config = launch.config_for("modulation_bwd", device, D=d)
    slots = max_chunks(rows, images, config["CHUNK"])
    grad_x = launch.empty((rows, d) if want_x else (0,), added.dtype, device)
    grad_y = launch.empty((rows, d) if want_y else (0,), added.dtype, device)
    partial = launch.empty((slots, parts, d), torch.float32, device) if parts else None
    launch.launch(
        _modulation_bwd_kernel, (slots,),
        grad_added, grad_normed, None if grad_normed is None else added, y, gate, scale, stats, cu_seqlens,
        grad_x if want_x else None, grad_y if want_y else None, partial, rows, images,
        *(_row_stride(tensor) for tensor in (grad_added, grad_normed, added, y, gate, scale)),
        D=d, PARTS=parts, BLOCK_D=next_power_of_2(d), **config,
    )  # fmt: skip
    grad_modulation = launch.empty((images, parts, d), _modulation_dtype(gate, scale), device)
    if partial is not None:
        summing = launch.config_for("modulation_sum", device, D=d)
        launch.launch(
            _sum_chunks_kernel, (images, cdiv(parts * d, summing["BLOCK"])),
            partial, cu_seqlens, grad_modulation, rows, images,
            WIDTH=parts * d, CHUNK=config["CHUNK"], **summing,
        )  # fmt: skip
    return grad_x, grad_y, grad_modulation


def _modulation_dtype(gate: Tensor | None, scale: Tensor | None) -> torch.dtype:
    return (gate if scale is None else scale).dtype


def _row_stride(rows: Tensor | None) -> int:
    return 0 if rows is None else rows.stride(0)
