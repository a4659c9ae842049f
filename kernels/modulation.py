"""adaLN on packed tokens: gated residual, modulated LayerNorm, or both, in one pass over the tokens.

    added = x + gate[image] * y
    normed = x_hat * (1 + scale[image]) + shift[image],  x_hat = (added - mean) / sqrt(var + eps)

Without a gated residual, added is x. A program takes consecutive rows of one image and keeps whole rows in registers,
so it loads the image's modulation once. An operation that lacks one half passes None for its pointers, and Triton
compiles the half away.

Backward is one pass over the tokens, with grad_hat = grad_normed (1 + scale) the gradient by x_hat:

    grad_x = grad_added + (grad_hat - mean(grad_hat) - x_hat mean(grad_hat x_hat)) / sqrt(var + eps)
    grad_y = gate grad_x

The gradients of shift, scale and gate are sums over the rows of an image. The pass writes one partial sum per chunk of
an image (see ``segments``), and a second kernel adds the chunks up in their order. Padding rows have no image: y is
never read there, x and its gradient pass through, normed and grad_y are zero.

In the comments at pointers, "float" is float32, bfloat16 or float16. Without a named stride, rows are contiguous.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcdit.kernels import launch
from dcdit.kernels.numerics import cdiv, next_power_of_2, widest
from dcdit.kernels.segments import find_chunk, max_chunks, segment_bounds

launch.set_default_configs(
    "modulation_fwd",
    D={
        64: {"ROWS": 8, "num_warps": 4},
        384: {"ROWS": 4, "num_warps": 4},
        1024: {"ROWS": 4, "num_warps": 8},
    },
)


@triton.jit(do_not_specialize=["rows", "images"])
def _modulation_fwd_kernel(
    x_ptr,  # (rows, D) float, row stride x_stride
    y_ptr,  # (rows, D) float, row stride y_stride; None without a gated residual, like gate and added
    gate_ptr,  # (images, D) float, row stride gate_stride
    shift_ptr,  # (images, D) float, row stride shift_stride; None without a norm, like scale, normed and stats
    scale_ptr,  # (images, D) float, row stride scale_stride
    cu_ptr,  # (images + 1,) int32
    added_ptr,  # (rows, D) in the wider dtype of x and y
    normed_ptr,  # (rows, D) in the same dtype
    stats_ptr,  # (2, rows) float32: mean and 1 / standard deviation
    rows, images, x_stride, y_stride, gate_stride, shift_stride, scale_stride, eps,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    image, first, last, _ = find_chunk(cu_ptr, images, rows, tl.program_id(0), ROWS)
    if first >= last:
        return
    row = first + tl.arange(0, ROWS)  # [ROWS]
    col = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    inside = (row < last)[:, None] & (col < D)[None, :]  # [ROWS, BLOCK_D]
    # In padding rows the modulation reads as zero.
    has_modulation = (col < D) & (image < images)  # [BLOCK_D]
    not_padding = inside & (image < images)  # [ROWS, BLOCK_D]
    image = image.to(tl.int64)
    x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    if y_ptr is not None:
        gate = tl.load(gate_ptr + image * gate_stride + col, mask=has_modulation, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + row[:, None] * y_stride + col[None, :], mask=not_padding, other=0.0).to(tl.float32)
        added = (x + gate[None, :] * y).to(added_ptr.dtype.element_ty)  # [ROWS, BLOCK_D]
        tl.store(added_ptr + row[:, None] * D + col[None, :], added, mask=inside)
        x = added.to(tl.float32)
    if normed_ptr is not None:
        shift = tl.load(shift_ptr + image * shift_stride + col, mask=has_modulation, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + image * scale_stride + col, mask=has_modulation, other=0.0).to(tl.float32)
        mean = tl.sum(x, 1) / D  # [ROWS]
        centred = tl.where(inside, x - mean[:, None], 0.0)  # [ROWS, BLOCK_D]
        rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)  # [ROWS]
        normed = centred * rstd[:, None] * (1.0 + scale[None, :]) + shift[None, :]  # [ROWS, BLOCK_D]
        tl.store(normed_ptr + row[:, None] * D + col[None, :], tl.where(not_padding, normed, 0.0), mask=inside)
        tl.store(stats_ptr + row, mean, mask=row < last)
        tl.store(stats_ptr + rows + row, rstd, mask=row < last)


launch.set_default_configs(
    "modulation_bwd",
    D={
        64: {"CHUNK": 16, "ROWS": 8, "num_warps": 2},
        1024: {"CHUNK": 16, "ROWS": 1, "num_warps": 4},
        1152: {"CHUNK": 16, "ROWS": 1, "num_warps": 8},
    },
)


@triton.jit(do_not_specialize=["rows", "images"])
def _modulation_bwd_kernel(
    grad_added_ptr,  # (rows, D) float, row stride grad_added_stride; None if nothing reads added
    grad_normed_ptr,  # (rows, D) float, row stride grad_normed_stride; None if nothing reads normed
    added_ptr,  # (rows, D) float, row stride added_stride: what was normed; None with grad_normed
    y_ptr,  # (rows, D) float, row stride y_stride; None if the gradient of the gate is not wanted
    gate_ptr,  # (images, D) float, row stride gate_stride; None without a gated residual
    scale_ptr,  # (images, D) float, row stride scale_stride; None with grad_normed
    stats_ptr,  # (2, rows) float32: mean and 1 / standard deviation; None with grad_normed
    cu_ptr,  # (images + 1,) int32
    grad_x_ptr,  # (rows, D) float; None if not wanted
    grad_y_ptr,  # (rows, D) float; None if not wanted
    partial_ptr,  # (chunks, PARTS, D) float32: shift, scale and gate, as far as wanted; None if none is
    rows, images, grad_added_stride, grad_normed_stride, added_stride, y_stride, gate_stride, scale_stride,
    D: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    chunk_index = tl.program_id(0)
    image, first, last, _ = find_chunk(cu_ptr, images, rows, chunk_index, CHUNK)
    if first >= last:
        return
    col = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    has_image = image < images
    has_modulation = (col < D) & has_image  # [BLOCK_D]
    image = image.to(tl.int64)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + image * gate_stride + col, mask=has_modulation, other=0.0).to(tl.float32)
    if grad_normed_ptr is not None:
        scale = tl.load(scale_ptr + image * scale_stride + col, mask=has_modulation, other=0.0).to(tl.float32)
    shift_sum = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    scale_sum = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    gate_sum = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)  # [ROWS]
        inside = (row < last)[:, None] & (col < D)[None, :]  # [ROWS, BLOCK_D]
        not_padding = inside & has_image
        if grad_added_ptr is None:
            grad_x = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
        else:
            grad_x = tl.load(grad_added_ptr + row[:, None] * grad_added_stride + col[None, :], mask=inside, other=0.0)
            grad_x = grad_x.to(tl.float32)
        if grad_normed_ptr is not None:
            offset = row[:, None] * grad_normed_stride + col[None, :]
            grad_normed = tl.load(grad_normed_ptr + offset, mask=not_padding, other=0.0)
            grad_normed = grad_normed.to(tl.float32)
            x = tl.load(added_ptr + row[:, None] * added_stride + col[None, :], mask=not_padding, other=0.0)
            x = x.to(tl.float32)
            mean = tl.load(stats_ptr + row, mask=(row < last) & has_image, other=0.0)  # [ROWS]
            rstd = tl.load(stats_ptr + rows + row, mask=(row < last) & has_image, other=0.0)  # [ROWS]
            x_hat = tl.where(not_padding, (x - mean[:, None]) * rstd[:, None], 0.0)  # [ROWS, BLOCK_D]
            shift_sum += grad_normed
            scale_sum += grad_normed * x_hat
            grad_hat = grad_normed * (1.0 + scale[None, :])  # [ROWS, BLOCK_D]
            mean_grad = tl.sum(grad_hat, 1) / D  # [ROWS]
            mean_grad_x_hat = tl.sum(grad_hat * x_hat, 1) / D
            grad_x += (grad_hat - mean_grad[:, None] - x_hat * mean_grad_x_hat[:, None]) * rstd[:, None]
        if grad_x_ptr is not None:
            tl.store(grad_x_ptr + row[:, None] * D + col[None, :], grad_x, mask=inside)
        if grad_y_ptr is not None:
            grad_y = tl.where(not_padding, grad_x * gate[None, :], 0.0)
            tl.store(grad_y_ptr + row[:, None] * D + col[None, :], grad_y, mask=inside)
        if y_ptr is not None:
            y = tl.load(y_ptr + row[:, None] * y_stride + col[None, :], mask=not_padding, other=0.0).to(tl.float32)
            gate_sum += grad_x * y
    if partial_ptr is not None:
        partial_ptr += chunk_index.to(tl.int64) * (PARTS * D) + col
        if PARTS >= 2:
            tl.store(partial_ptr, tl.sum(shift_sum, 0), mask=has_modulation)
            tl.store(partial_ptr + D, tl.sum(scale_sum, 0), mask=has_modulation)
        if y_ptr is not None:
            tl.store(partial_ptr + (PARTS - 1) * D, tl.sum(gate_sum, 0), mask=has_modulation)


launch.set_default_configs("modulation_sum", D={1024: {"CHUNKS": 8, "BLOCK": 128, "num_warps": 4}})


@triton.jit(do_not_specialize=["rows", "images"])
def _modulation_sum_kernel(
    partial_ptr,  # (chunks, WIDTH) float32
    cu_ptr,  # (images + 1,) int32
    out_ptr,  # (images, WIDTH) float
    rows, images,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up the chunks of an image. WIDTH is PARTS * D."""
    image = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    start, end = segment_bounds(cu_ptr, image, images, rows)
    first_chunk = start // CHUNK + image
    chunks = tl.cdiv(end - start, CHUNK)
    total = tl.zeros((CHUNKS, BLOCK), dtype=tl.float32)
    for base in range(0, chunks, CHUNKS):
        chunk = base + tl.arange(0, CHUNKS)  # [CHUNKS]
        inside = (chunk < chunks)[:, None] & (col < WIDTH)[None, :]  # [CHUNKS, BLOCK]
        total += tl.load(partial_ptr + (first_chunk + chunk)[:, None] * WIDTH + col[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + image * WIDTH + col, tl.sum(total, 0), mask=col < WIDTH)


def modulated_layer_norm_fwd(
    t: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(T, D) rows and (B, D) modulation with unit last strides -> normed (T, D), float32 mean and 1/std (2, T)."""
    normed, stats = launch.empty_like(t, t.dtype), launch.empty((2, t.shape[0]), torch.float32, t.device)
    _forward(t, None, None, shift, scale, cu_seqlens, None, normed, stats, eps)
    return normed, stats


def gated_add_fwd(x: Tensor, y: Tensor, gate: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(T, D) rows and (B, D) gate with unit last strides -> (T, D) in the wider dtype of x and y."""
    added = launch.empty_like(x, widest(x, y))
    _forward(x, y, gate, None, None, cu_seqlens, added, None, None, 0.0)
    return added


def gated_add_modulated_layer_norm_fwd(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Both of the above in one pass: the sum (T, D), its norm (T, D), float32 mean and 1/std (2, T)."""
    added = launch.empty_like(x, widest(x, y))
    normed, stats = launch.empty_like(added, added.dtype), launch.empty((2, x.shape[0]), torch.float32, x.device)
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
        *map(_row_stride, (x, y, gate, shift, scale)), eps,
        D=d, BLOCK_D=next_power_of_2(d), **config,
    )  # fmt: skip


def modulation_bwd(
    grad_added: Tensor | None, grad_normed: Tensor | None, added: Tensor, y: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, stats: Tensor | None, cu_seqlens: Tensor, x_dtype: torch.dtype | None,
    y_dtype: torch.dtype | None, want_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of all three operations; whatever is not wanted comes back empty.

    Args:
        grad_added: gradient of the sum (T, D), None if nothing reads it.
        grad_normed: gradient of the norm (T, D), None if nothing reads it; then scale and stats are None too.
        added: what was normed (T, D); without a norm it gives the shape only.
        y: what was gated (T, D), if the gate's gradient is wanted.
        gate: (B, D), None if nothing was added.
        scale, stats: (B, D) and what the forward returned.
        x_dtype, y_dtype: of the gradients of x and of y, None where not wanted.
        want_norm: compute the gradients of shift and scale.

    Returns:
        Gradients of x and y (T, D), and (B, parts, D) in the modulation's dtype: shift and scale if wanted, then the
        gate if wanted.
    """
    (rows, d), images, device = added.shape, cu_seqlens.shape[0] - 1, added.device
    parts = 2 * want_norm + (y is not None)
    config = launch.config_for("modulation_bwd", device, D=d)
    chunks = max_chunks(rows, images, config["CHUNK"])
    grad_x, grad_y = (
        launch.empty((0,), added.dtype, device) if dtype is None else launch.empty((rows, d), dtype, device)
        for dtype in (x_dtype, y_dtype)
    )
    partial = launch.empty((chunks, parts, d), torch.float32, device) if parts else None
    launch.launch(
        _modulation_bwd_kernel, (chunks,),
        grad_added, grad_normed, None if grad_normed is None else added, y, gate, scale, stats, cu_seqlens,
        None if x_dtype is None else grad_x, None if y_dtype is None else grad_y, partial, rows, images,
        *(_row_stride(tensor) for tensor in (grad_added, grad_normed, added, y, gate, scale)),
        D=d, PARTS=parts, BLOCK_D=next_power_of_2(d), **config,
    )  # fmt: skip
    grad_modulation = launch.empty((images, parts, d), _modulation_dtype(gate, scale), device)
    if partial is not None:
        sum_config = launch.config_for("modulation_sum", device, D=d)
        launch.launch(
            _modulation_sum_kernel, (images, cdiv(parts * d, sum_config["BLOCK"])),
            partial, cu_seqlens, grad_modulation, rows, images,
            WIDTH=parts * d, CHUNK=config["CHUNK"], **sum_config,
        )  # fmt: skip
    return grad_x, grad_y, grad_modulation


def _modulation_dtype(gate: Tensor | None, scale: Tensor | None) -> torch.dtype:
    return (gate if scale is None else scale).dtype


def _row_stride(rows: Tensor | None) -> int:
    return 0 if rows is None else rows.stride(0)
