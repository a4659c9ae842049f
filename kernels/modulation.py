"""adaLN on packed tokens: gated residual, modulated norm, or both, in one pass over the tokens.

    added = x + gate[image] * y
    normed = x_hat * (1 + scale[image]) + shift[image],  x_hat = (added - mean) / sqrt(var + eps)

RMSNorm has no mean: it is 0, and var is the mean square. A scale that is whole takes the place of 1 + scale: the weight
of a norm is part of it.

Without a gated residual, added is x. An operation that lacks one half passes None for its pointers, and Triton compiles
the half away. Rows are kept whole in registers, in two parts (see ``rows``).

In the forward, the rows are divided evenly over as many programs as the GPU holds at a time. A program looks up the
image of its first row and walks on from there. What it computes for a row depends on that row and its image alone, so
the number of programs changes no bit.

Backward is one pass over the tokens, with grad_hat = grad_normed (1 + scale) the gradient by x_hat:

    grad_x = grad_added + (grad_hat - mean(grad_hat) - x_hat mean(grad_hat x_hat)) / sqrt(var + eps)   (RMSNorm: without
                                                                                                 mean(grad_hat))
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
from dcdit.kernels.numerics import cdiv, widest
from dcdit.kernels.rows import (
    load_part,
    load_table_part,
    parts_of,
    rows_from,
    store_part,
    sum_columns,
)
from dcdit.kernels.segments import find_chunk, find_segment, max_chunks, next_segment, segment_bounds

launch.set_default_configs(
    "modulation_fwd",
    D={
        64: {"ROWS": 16, "PER_SM": 16, "num_warps": 1},
        288: {"ROWS": 8, "PER_SM": 12, "num_warps": 1, "maxnreg": 208},
        384: {"ROWS": 4, "PER_SM": 16, "num_warps": 1},
        1024: {"ROWS": 1, "PER_SM": 16, "num_warps": 1, "maxnreg": 128},
        2048: {"ROWS": 1, "PER_SM": 12, "num_warps": 2},
    },
)


@triton.jit
def _add_part(
    x_ptr, y_ptr, gate_ptr, added_ptr, exists, FIRST: tl.constexpr, N: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """``x + gate y`` [ROWS, N]: stored, and returned in float32 as it is stored. Without y it is x."""
    x = load_part(x_ptr, exists, FIRST, N, D).to(tl.float32)
    if y_ptr is not None:
        y = load_part(y_ptr, exists, FIRST, N, D).to(tl.float32)
        added = (x + load_table_part(gate_ptr, FIRST, N, D) * y).to(added_ptr.dtype.element_ty)
        store_part(added_ptr, added, exists, FIRST, N, D)
        x = added.to(tl.float32)
    return x


@triton.jit
def _centre_part(x, mean, FIRST: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    """``x - mean`` [ROWS, N], 0 past column D."""
    centred = x - mean
    if FIRST + N > D:
        centred = tl.where((FIRST + tl.arange(0, N) < D)[None, :], centred, 0.0)
    return centred


@triton.jit
def _norm_part(
    centred, rstd, shift_ptr, scale_ptr, normed_ptr, exists, WHOLE: tl.constexpr, FIRST: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    factor = load_table_part(scale_ptr, FIRST, N, D)
    if not WHOLE:
        factor = 1.0 + factor
    normed = centred * rstd * factor
    if shift_ptr is not None:
        normed += load_table_part(shift_ptr, FIRST, N, D)
    store_part(normed_ptr, normed, exists, FIRST, N, D)


@triton.jit
def _pad_part(
    x_ptr, added_ptr, normed_ptr, exists, ROWS: tl.constexpr, FIRST: tl.constexpr, N: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    if added_ptr is not None:
        store_part(added_ptr, load_part(x_ptr, exists, FIRST, N, D), exists, FIRST, N, D)
    if normed_ptr is not None:
        store_part(normed_ptr, tl.zeros((ROWS, N), tl.float32), exists, FIRST, N, D)


@triton.jit(do_not_specialize=["rows", "images", "rows_each"])
def _modulation_fwd_kernel(
    x_ptr,  # (rows, D) float, row stride x_stride
    y_ptr,  # (rows, D) float, row stride y_stride; None without a gated residual, like gate and added
    gate_ptr,  # (images, D) float, row stride gate_stride
    shift_ptr,  # (images, D) float, row stride shift_stride; None without a shift
    scale_ptr,  # (images, D) float, row stride scale_stride; None without a norm, like normed and stats
    cu_ptr,  # (images + 1,) int32
    added_ptr,  # (rows, D) in the wider dtype of x and y
    normed_ptr,  # (rows, D) in the same dtype
    stats_ptr,  # (2, rows) float32: mean and 1 / standard deviation, 0 in padding rows
    rows, images, rows_each, x_stride, y_stride, gate_stride, shift_stride, scale_stride, eps,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, RMS: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, PER_SM: tl.constexpr,
):  # fmt: skip
    """A program takes rows_each consecutive rows, ROWS of one image at a time."""
    first = tl.program_id(0).to(tl.int64) * rows_each
    last = tl.minimum(first + rows_each, rows)
    image = find_segment(cu_ptr, images, first)
    image, end = image - 1, first.to(tl.int32)  # as if the image before ended here: the loop looks up the next
    while first < last:
        image, end = next_segment(cu_ptr, image, end, images, rows, first)
        row, exists = rows_from(first, tl.minimum(end, last), ROWS)
        first = tl.minimum(tl.minimum(first + ROWS, end), last)
        x = x_ptr + row * x_stride
        y = None if y_ptr is None else y_ptr + row * y_stride
        added = None if added_ptr is None else added_ptr + row * D
        normed = None if normed_ptr is None else normed_ptr + row * D
        if image == images:
            _pad_part(x, added, normed, exists, ROWS, 0, MAIN, D)
            if TAIL > 0:
                _pad_part(x, added, normed, exists, ROWS, MAIN, TAIL, D)
            if normed_ptr is not None:
                tl.store(stats_ptr + row, 0.0, mask=row < first)
                tl.store(stats_ptr + rows + row, 0.0, mask=row < first)
        else:
            gate = None if gate_ptr is None else gate_ptr + image.to(tl.int64) * gate_stride
            shift = None if shift_ptr is None else shift_ptr + image.to(tl.int64) * shift_stride
            scale = None if scale_ptr is None else scale_ptr + image.to(tl.int64) * scale_stride
            main = _add_part(x, y, gate, added, exists, 0, MAIN, D)  # [ROWS, MAIN]
            if TAIL > 0:
                tail = _add_part(x, y, gate, added, exists, MAIN, TAIL, D)  # [ROWS, TAIL]
            if normed_ptr is not None:
                if RMS:
                    tl.store(stats_ptr + row, 0.0, mask=row < first)
                else:
                    total = sum_columns(main)
                    if TAIL > 0:
                        total += sum_columns(tail)
                    mean = total / D
                    main = _centre_part(main, mean, 0, MAIN, D)
                    if TAIL > 0:
                        tail = _centre_part(tail, mean, MAIN, TAIL, D)
                    tl.store(stats_ptr + row, mean, mask=row < first)
                square = sum_columns(main * main)
                if TAIL > 0:
                    square += sum_columns(tail * tail)
                rstd = tl.rsqrt(square / D + eps)
                _norm_part(main, rstd, shift, scale, normed, exists, WHOLE, 0, MAIN, D)
                if TAIL > 0:
                    _norm_part(tail, rstd, shift, scale, normed, exists, WHOLE, MAIN, TAIL, D)
                tl.store(stats_ptr + rows + row, rstd, mask=row < first)


launch.set_default_configs(
    "modulation_bwd",
    D={
        64: {"CHUNK": 16, "ROWS": 8, "num_warps": 1},
        288: {"CHUNK": 16, "ROWS": 1, "num_warps": 1},
        384: {"CHUNK": 16, "ROWS": 1, "num_warps": 2},
        1024: {"CHUNK": 16, "ROWS": 1, "num_warps": 4},
    },
)


@triton.jit
def _load_or_zero(ptr, exists, ROWS: tl.constexpr, FIRST: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    """Columns of rows in float32 [ROWS, N], zeros for a pointer that is None."""
    if ptr is not None:
        return load_part(ptr, exists, FIRST, N, D).to(tl.float32)
    else:
        return tl.zeros((ROWS, N), tl.float32)


@triton.jit
def _table_or_zero(ptr, FIRST: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    if ptr is not None:
        return load_table_part(ptr, FIRST, N, D)
    else:
        return tl.zeros((1, N), tl.float32)


@triton.jit
def _store_gradient_part(
    grad_x, gate, grad_x_ptr, grad_y_ptr, exists, FIRST: tl.constexpr, N: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    if grad_x_ptr is not None:
        store_part(grad_x_ptr, grad_x, exists, FIRST, N, D)
    if grad_y_ptr is not None:
        store_part(grad_y_ptr, grad_x * gate, exists, FIRST, N, D)


@triton.jit
def _pad_gradient_part(
    grad_added_ptr, grad_x_ptr, grad_y_ptr, exists, ROWS: tl.constexpr, FIRST: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    if grad_x_ptr is not None:
        store_part(grad_x_ptr, _load_or_zero(grad_added_ptr, exists, ROWS, FIRST, N, D), exists, FIRST, N, D)
    if grad_y_ptr is not None:
        store_part(grad_y_ptr, tl.zeros((ROWS, N), tl.float32), exists, FIRST, N, D)


@triton.jit
def _store_sum_part(
    shift_sum, scale_sum, gate_sum, partial_ptr, GATE: tl.constexpr, PARTS: tl.constexpr,
    FIRST: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    col = FIRST + tl.arange(0, N)  # [N]
    if PARTS >= 2:
        tl.store(partial_ptr + col, tl.sum(shift_sum, 0), mask=col < D)
        tl.store(partial_ptr + D + col, tl.sum(scale_sum, 0), mask=col < D)
    if GATE:
        tl.store(partial_ptr + (PARTS - 1) * D + col, tl.sum(gate_sum, 0), mask=col < D)


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
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, PARTS: tl.constexpr, RMS: tl.constexpr,
    WHOLE: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program takes one chunk, ROWS rows at a time."""
    chunk_index = tl.program_id(0)
    image, first, last, _ = find_chunk(cu_ptr, images, rows, chunk_index, CHUNK)
    if first >= last:
        return
    image = image.to(tl.int64)
    if image == images:
        for start in range(first, last, ROWS):
            row, exists = rows_from(start, last, ROWS)
            grad_added = None if grad_added_ptr is None else grad_added_ptr + row * grad_added_stride
            grad_x = None if grad_x_ptr is None else grad_x_ptr + row * D
            grad_y = None if grad_y_ptr is None else grad_y_ptr + row * D
            _pad_gradient_part(grad_added, grad_x, grad_y, exists, ROWS, 0, MAIN, D)
            if TAIL > 0:
                _pad_gradient_part(grad_added, grad_x, grad_y, exists, ROWS, MAIN, TAIL, D)
        return
    gate = None if gate_ptr is None else gate_ptr + image * gate_stride
    scale = None if scale_ptr is None else scale_ptr + image * scale_stride
    gate_main, scale_main = _table_or_zero(gate, 0, MAIN, D), _table_or_zero(scale, 0, MAIN, D)
    if not WHOLE:
        scale_main = 1.0 + scale_main
    shift_sum = tl.zeros((ROWS, MAIN), tl.float32)
    scale_sum = tl.zeros((ROWS, MAIN), tl.float32)
    gate_sum = tl.zeros((ROWS, MAIN), tl.float32)
    if TAIL > 0:
        gate_tail, scale_tail = _table_or_zero(gate, MAIN, TAIL, D), _table_or_zero(scale, MAIN, TAIL, D)
        if not WHOLE:
            scale_tail = 1.0 + scale_tail
        tail_shift_sum = tl.zeros((ROWS, TAIL), tl.float32)
        tail_scale_sum = tl.zeros((ROWS, TAIL), tl.float32)
        tail_gate_sum = tl.zeros((ROWS, TAIL), tl.float32)
    for start in range(first, last, ROWS):
        row, exists = rows_from(start, last, ROWS)
        grad_added = None if grad_added_ptr is None else grad_added_ptr + row * grad_added_stride
        grad_normed = None if grad_normed_ptr is None else grad_normed_ptr + row * grad_normed_stride
        added = None if added_ptr is None else added_ptr + row * added_stride
        y = None if y_ptr is None else y_ptr + row * y_stride
        grad_x = None if grad_x_ptr is None else grad_x_ptr + row * D
        grad_y = None if grad_y_ptr is None else grad_y_ptr + row * D
        # All loads come before the sums over the columns, because none is moved over the barriers in them.
        dx = _load_or_zero(grad_added, exists, ROWS, 0, MAIN, D)  # [ROWS, MAIN]
        dn = _load_or_zero(grad_normed, exists, ROWS, 0, MAIN, D)
        x_hat = _load_or_zero(added, exists, ROWS, 0, MAIN, D)
        y_main = _load_or_zero(y, exists, ROWS, 0, MAIN, D)
        if TAIL > 0:
            tail_dx = _load_or_zero(grad_added, exists, ROWS, MAIN, TAIL, D)  # [ROWS, TAIL]
            tail_dn = _load_or_zero(grad_normed, exists, ROWS, MAIN, TAIL, D)
            tail_x_hat = _load_or_zero(added, exists, ROWS, MAIN, TAIL, D)
            y_tail = _load_or_zero(y, exists, ROWS, MAIN, TAIL, D)
        if grad_normed_ptr is not None:
            mean = tl.load(stats_ptr + row, mask=row < last, other=0.0)
            rstd = tl.load(stats_ptr + rows + row, mask=row < last, other=0.0)
            x_hat = (x_hat - mean) * rstd
            dx_hat = dn * scale_main
            shift_sum += dn
            scale_sum += dn * x_hat
            total, total_x_hat = sum_columns(dx_hat), sum_columns(dx_hat * x_hat)
            if TAIL > 0:
                tail_x_hat = (tail_x_hat - mean) * rstd
                tail_dx_hat = tail_dn * scale_tail
                tail_shift_sum += tail_dn
                tail_scale_sum += tail_dn * tail_x_hat
                total += sum_columns(tail_dx_hat)
                total_x_hat += sum_columns(tail_dx_hat * tail_x_hat)
            total, total_x_hat = total / D, total_x_hat / D
            if RMS:
                total = 0.0
            dx += (dx_hat - total - x_hat * total_x_hat) * rstd
            if TAIL > 0:
                tail_dx += (tail_dx_hat - total - tail_x_hat * total_x_hat) * rstd
        _store_gradient_part(dx, gate_main, grad_x, grad_y, exists, 0, MAIN, D)
        gate_sum += dx * y_main
        if TAIL > 0:
            _store_gradient_part(tail_dx, gate_tail, grad_x, grad_y, exists, MAIN, TAIL, D)
            tail_gate_sum += tail_dx * y_tail
    if partial_ptr is not None:
        partial_ptr += chunk_index.to(tl.int64) * (PARTS * D)
        GATE: tl.constexpr = y_ptr is not None
        _store_sum_part(shift_sum, scale_sum, gate_sum, partial_ptr, GATE, PARTS, 0, MAIN, D)
        if TAIL > 0:
            _store_sum_part(tail_shift_sum, tail_scale_sum, tail_gate_sum, partial_ptr, GATE, PARTS, MAIN, TAIL, D)


launch.set_default_configs("modulation_sum", D={1024: {"CHUNKS": 8, "BLOCK": 128, "num_warps": 1}})


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


def modulated_norm_fwd(
    t: Tensor, shift: Tensor | None, scale: Tensor, cu_seqlens: Tensor, eps: float, rms: bool, whole: bool
) -> tuple[Tensor, Tensor]:
    """(T, D) rows and (B, D) modulation with unit last strides -> normed (T, D), float32 mean and 1/std (2, T).

    RMSNorm if rms, else LayerNorm. A whole scale is the factor itself, else 1 + scale is.
    """
    normed, stats = launch.empty_like(t, t.dtype), launch.empty((2, t.shape[0]), torch.float32, t.device)
    _forward(t, None, None, shift, scale, cu_seqlens, None, normed, stats, eps, rms, whole)
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
    added: Tensor | None, normed: Tensor | None, stats: Tensor | None, eps: float, rms: bool = False,
    whole: bool = False,
) -> None:  # fmt: skip
    (rows, d), images = x.shape, cu_seqlens.shape[0] - 1
    config = launch.config_for("modulation_fwd", x.device, D=d)
    rows_each = max(config["ROWS"], cdiv(rows, config["PER_SM"] * launch.multiprocessors(x.device)))
    launch.launch(
        _modulation_fwd_kernel, (cdiv(rows, rows_each),),
        x, y, gate, shift, scale, cu_seqlens, added, normed, stats, rows, images, rows_each,
        *map(_row_stride, (x, y, gate, shift, scale)), eps,
        D=d, **parts_of(d), RMS=rms, WHOLE=whole, **config,
    )  # fmt: skip


def modulation_bwd(
    grad_added: Tensor | None, grad_normed: Tensor | None, added: Tensor, y: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, stats: Tensor | None, cu_seqlens: Tensor, x_dtype: torch.dtype | None,
    y_dtype: torch.dtype | None, want_norm: bool, rms: bool, whole: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of all operations; whatever is not wanted comes back empty.

    Args:
        grad_added: gradient of the sum (T, D), None if nothing reads it.
        grad_normed: gradient of the norm (T, D), None if nothing reads it; then scale and stats are None too.
        added: what was normed (T, D); without a norm it gives the shape only.
        y: what was gated (T, D), if the gate's gradient is wanted.
        gate: (B, D), None if nothing was added.
        scale, stats: (B, D) and what the forward returned.
        x_dtype, y_dtype: of the gradients of x and of y, None where not wanted.
        want_norm: compute the gradients of shift and scale.
        rms, whole: as in the forward.

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
        D=d, **parts_of(d), PARTS=parts, RMS=rms, WHOLE=whole, **config,
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
